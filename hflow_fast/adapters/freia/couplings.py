"""FrEIA's coupling blocks: clamps, scales, shifts, log-dets and the joining of halves in one pass per coupling.

A block that transforms both parts is two couplings; between others, the first of them is made one of the last channels
by a change of order that folds into its neighbours.
"""

from __future__ import annotations

from functools import lru_cache, partial
from types import CodeType
from typing import Any, Sequence

import torch
from FrEIA import modules as stock
from FrEIA.modules.coupling_layers import _BaseCouplingBlock
from torch import Tensor, nn

from ..._checks import compute_dtype
from ...nn._fusion import ChannelMap, Coupling, Opaque, Piece
from ...ops import CouplingSpec, coupling
from ...ops.flow_step import MAX_FUSED_CHANNELS
from .._chain import constant, permutation
from ..networks import call_network
from .base import Conditioned, Evaluated, FusedLayer, with_conditions

__all__ = [
    "AffineCouplingOneSided", "ConditionalAffineTransform", "GINCouplingBlock", "GLOWCouplingBlock",
    "NICECouplingBlock", "RNVPCouplingBlock", "active_last", "amplify", "spec_of",
]  # fmt: skip


_CLAMPS = frozenset(id(code) for code in _BaseCouplingBlock.__init__.__code__.co_consts
                    if isinstance(code, CodeType))
"""The ids of the code of FrEIA's own clamps, which are functions without a name."""


@lru_cache
def spec_of(**options: Any) -> CouplingSpec:
    """The one spec with these options."""
    return CouplingSpec(**options)


def active_last(active: int, channels: int) -> str | None:
    """The name of the active set of the last ``active`` of ``channels`` channels, if it has one."""
    if active == channels - channels // 2:
        return "channels"
    return "channels_ceil" if active == channels // 2 else None


def amplify(raw: Tensor, scale: float, shift: float) -> Tensor:
    """A network's output (B, 2n, …) with its first half times ``scale`` and its second half times ``shift``."""
    if scale == shift == 1:
        return raw
    return raw * _factors(raw.shape[1] // 2, raw.dim(), scale, shift, compute_dtype(raw), raw.device)


@constant
def _factors(half: int, dim: int, scale: float, shift: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    factors = torch.full((2 * half, *(1,) * (dim - 2)), scale, dtype=dtype, device=device)
    factors[half:] = shift
    return factors


class _Clamped(FusedLayer):
    """A block with one of FrEIA's clamps: log-scales of clamp·0.636·atan s, clamp·tanh s or clamp·tanh(s/2)."""

    @staticmethod
    def unfit(layer: nn.Module) -> str:
        if _scale_map(layer) is None:
            return "has a clamp_activation of its own; ATAN, TANH and SIGMOID have kernels"
        return "" if layer.clamp > 0 else f"has clamp {layer.clamp:g}; above 0 there is a kernel"

    def spec(self, active: str) -> CouplingSpec:
        return spec_of(scale_map=_scale_map(self)[0], clamp=float(self.clamp), active=active)

    def amplified(self, raw: Tensor) -> Tensor:
        """A network's output, read by :meth:`spec`."""
        return amplify(raw, _scale_map(self)[1], 1.0)


def _scale_map(block: _BaseCouplingBlock) -> tuple[str, float] | None:
    """The scale map for the clamp of ``block``, and the factor on s that it takes. None: a clamp of the user's."""
    function = block.f_clamp
    if function is torch.tanh:
        return "tanh", block.clamp
    code = getattr(function, "__code__", None)
    if id(code) not in _CLAMPS:
        return None
    return ("atan", 1.0) if "atan" in code.co_names else ("tanh", block.clamp / 2)


class AffineCouplingOneSided(_Clamped, Conditioned, stock.AffineCouplingOneSided):
    """The last channels, by a network of the others."""

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        active = active_last(self.split_len2, self.channels)
        if active is None:
            return [Opaque(partial(self._parts, inverse=inverse, context=context))]
        return [Coupling(lambda x: self._raw(x[:, :self.split_len1], context), self.spec(active), inverse)]

    def _raw(self, passive: Tensor, context: Sequence[Tensor]) -> Tensor:
        return self.amplified(call_network(self.subnet, with_conditions(self, passive, context)))

    def _parts(self, x: Tensor, inverse: bool, context: Sequence[Tensor]) -> Evaluated:
        x1, x2 = torch.split(x, [self.split_len1, self.split_len2], dim=1)
        y2, log_det = coupling(x2, self._raw(x1, context), self.spec("all"), inverse=inverse)
        return torch.cat([x1, y2], dim=1), log_det


class ConditionalAffineTransform(_Clamped, Conditioned, stock.ConditionalAffineTransform):
    """All channels, by a network of the conditions."""

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        return [Coupling(lambda x: self._raw(context), self.spec("all"), inverse)]

    def _raw(self, context: Sequence[Tensor]) -> Tensor:
        return self.amplified(call_network(self.subnet, torch.cat(context, dim=1) if len(context) > 1 else context[0]))


class _TwoSided(FusedLayer):
    """The first channels by a network of the last ones, then the last ones by a network of the new first ones."""

    def spec(self, active: str) -> CouplingSpec:
        raise NotImplementedError

    def raw_first(self, passive: Tensor) -> Tensor:
        """Raw parameters of the first channels."""
        raise NotImplementedError

    def raw_last(self, passive: Tensor) -> Tensor:
        """Raw parameters of the last channels."""
        raise NotImplementedError

    def forward(self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False,
                jac: bool = True) -> tuple[tuple[Tensor], Tensor | float]:
        y, log_det = self._parts(x[0], rev, c)
        return (y,), log_det if self.log_det_per_sample else 0.0

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        first, last = self.split_len1, self.split_len2
        if self.channels > MAX_FUSED_CHANNELS or active_last(first, self.channels) is None:
            return [Opaque(partial(self._parts, inverse=inverse, context=context))]
        steps = [
            self._first_to_last(first, like),
            Coupling(lambda x: self.raw_first(with_conditions(self, x[:, :last], context)),
                     self.spec(active_last(first, self.channels)), inverse),
            self._first_to_last(last, like),
            Coupling(lambda x: self.raw_last(with_conditions(self, x[:, :first], context)),
                     self.spec(active_last(last, self.channels)), inverse),
        ]
        return [steps[3], *steps[:3]] if inverse else steps

    def _first_to_last(self, count: int, like: Tensor) -> ChannelMap:
        """The first ``count`` channels behind the others."""
        return permutation((*range(count, self.channels), *range(count)), compute_dtype(like), like.device)

    def _parts(self, x: Tensor, inverse: bool, context: Sequence[Tensor]) -> Evaluated:
        x1, x2 = torch.split(x, [self.split_len1, self.split_len2], dim=1)
        spec = self.spec("all")
        if inverse:
            y2, of_last = coupling(x2, self.raw_last(with_conditions(self, x1, context)), spec, inverse=True)
            y1, of_first = coupling(x1, self.raw_first(with_conditions(self, y2, context)), spec, inverse=True)
        else:
            y1, of_first = coupling(x1, self.raw_first(with_conditions(self, x2, context)), spec)
            y2, of_last = coupling(x2, self.raw_last(with_conditions(self, y1, context)), spec)
        return torch.cat([y1, y2], dim=1), of_first + of_last


class GLOWCouplingBlock(_Clamped, _TwoSided, stock.GLOWCouplingBlock):
    """One network for the scales and shifts of each part."""

    @staticmethod
    def networks(layer: nn.Module) -> tuple[nn.Module, ...]:
        return layer.subnet1, layer.subnet2

    def raw_first(self, passive: Tensor) -> Tensor:
        return self.amplified(call_network(self.subnet2, passive))

    def raw_last(self, passive: Tensor) -> Tensor:
        return self.amplified(call_network(self.subnet1, passive))


class RNVPCouplingBlock(_Clamped, _TwoSided, stock.RNVPCouplingBlock):
    """A network for the scales and one for the shifts of each part."""

    @staticmethod
    def networks(layer: nn.Module) -> tuple[nn.Module, ...]:
        return layer.subnet_s1, layer.subnet_t1, layer.subnet_s2, layer.subnet_t2

    def raw_first(self, passive: Tensor) -> Tensor:
        return self._join(call_network(self.subnet_s2, passive), call_network(self.subnet_t2, passive))

    def raw_last(self, passive: Tensor) -> Tensor:
        return self._join(call_network(self.subnet_s1, passive), call_network(self.subnet_t1, passive))

    def _join(self, scale: Tensor, shift: Tensor) -> Tensor:
        factor = _scale_map(self)[1]
        return torch.cat([scale if factor == 1 else scale * factor, shift], dim=1)


class NICECouplingBlock(_TwoSided, stock.NICECouplingBlock):
    """Shifts alone."""

    log_det_per_sample = False

    @staticmethod
    def networks(layer: nn.Module) -> tuple[nn.Module, ...]:
        return layer.F, layer.G

    def spec(self, active: str) -> CouplingSpec:
        return spec_of(scale_map="none", active=active)

    def raw_first(self, passive: Tensor) -> Tensor:
        return call_network(self.F, passive)

    def raw_last(self, passive: Tensor) -> Tensor:
        return call_network(self.G, passive)


class GINCouplingBlock(_TwoSided, stock.GINCouplingBlock):
    """Log-scales whose mean over the channels is taken away, any clamp."""

    log_det_per_sample = False

    @staticmethod
    def networks(layer: nn.Module) -> tuple[nn.Module, ...]:
        return layer.subnet1, layer.subnet2

    def spec(self, active: str) -> CouplingSpec:
        return spec_of(scale_map="exp", active=active)

    def raw_first(self, passive: Tensor) -> Tensor:
        return self._centred(call_network(self.subnet2, passive))

    def raw_last(self, passive: Tensor) -> Tensor:
        return self._centred(call_network(self.subnet1, passive))

    def _centred(self, raw: Tensor) -> Tensor:
        scale, shift = raw.chunk(2, dim=1)
        scale = self.clamp * self.f_clamp(scale)
        return torch.cat([scale - scale.mean(dim=1, keepdim=True), shift], dim=1)
