"""The layers of normflows that run fused."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, Hashable, Iterable, Sequence

import normflows as nf
import torch
from torch import Tensor, nn

from ...nn._folding import ChannelMap
from ...nn._fusion import Coupling, Opaque
from ...ops import CouplingSpec, actnorm, conv1x1, coupling, lu
from .._chain import Map, Part, Shuffle, pieces, plu, undone
from .._state import is_set
from . import checkerboard
from .chain import Fused, call, parts_of
from .networks import ConvNet2d

__all__ = ["FAST_LAYERS", "SCALE_MAPS", "ActNorm", "AffineConstFlow", "AffineCoupling", "AffineCouplingBlock",
           "GlowBlock", "Invertible1x1Conv", "Permute"]

SCALE_MAPS = {"exp": "exp", "sigmoid": "sigmoid_inverse", "sigmoid_inv": "sigmoid"}
"""From normflows' names to ours: both are of the sampling direction, x = a(s) z + t."""


class AffineConstFlow(Fused, nf.flows.AffineConstFlow):
    """z ↔ z·e^s + t per channel, sampling by multiplying."""

    mixes = False

    def parts(self, x: Tensor, sampling: bool) -> Iterable[Part] | None:
        # One channel may be spread over many, which only the stock layer does.
        fits = self.s.dim() == x.dim() <= 4 and 1 < self.map_channels() == self.s.numel() == self.t.numel()
        return [Map(self, sampling)] if fits else None

    def kind(self) -> Hashable:
        return self.map_channels(), self.s.dtype, self.s.device

    def map_channels(self) -> int:
        return self.s.shape[1]

    @staticmethod
    def stacked(layers: Sequence[AffineConstFlow], inverse: bool) -> ChannelMap:
        log_scale = torch.stack([layer.s for layer in layers]).flatten(1)
        shift = torch.stack([layer.t for layer in layers]).flatten(1)
        if inverse:
            return ChannelMap(log_scale.exp(), shift, log_scale.sum(1))
        weight = torch.exp(-log_scale)
        return ChannelMap(weight, -weight * shift, -log_scale.sum(1))

    def _evaluate(self, z: Tensor, sampling: bool) -> tuple[Tensor, Tensor]:
        y, _ = actnorm(z, self.s.flatten(), self.t.flatten(), inverse=not sampling)
        return y, self.s.sum() * (math.prod(z.shape[2:]) if sampling else -math.prod(z.shape[2:]))


class ActNorm(AffineConstFlow, nf.flows.ActNorm):
    """An :class:`AffineConstFlow` that the first batch initialises, as the stock layer does."""

    def parts(self, x: Tensor, sampling: bool) -> Iterable[Part] | None:
        return super().parts(x, sampling) if is_set(self, "data_dep_init_done") else None


class Invertible1x1Conv(Fused, nf.flows.Invertible1x1Conv):
    """The inverse 1 × 1 convolution when sampling. Inverted in float64."""

    mixes = True

    def parts(self, x: Tensor, sampling: bool) -> Iterable[Part] | None:
        return [Map(self, sampling)] if x.dim() == 4 else None

    def kind(self) -> Hashable:
        parameter = self.log_S if self.use_lu else self.W
        return self.use_lu, self.num_channels, parameter.dtype, parameter.device

    def map_channels(self) -> int:
        return self.num_channels

    @staticmethod
    def stacked(layers: Sequence[Invertible1x1Conv], inverse: bool) -> ChannelMap:
        if layers[0].use_lu:
            maps = plu(*(torch.stack([getattr(layer, name) for layer in layers])
                         for name in ("P", "L", "U", "sign_S", "log_S")))
        else:
            weight = torch.stack([layer.W for layer in layers])
            maps = ChannelMap(weight, None, lu(weight)[0])
        return undone(maps, "Invertible1x1Conv") if inverse else maps

    def _evaluate(self, z: Tensor, sampling: bool) -> tuple[Tensor, Tensor]:
        channel_map, = pieces(self.parts(z, sampling), z)
        return conv1x1(z, channel_map.weight), channel_map.log_det * math.prod(z.shape[2:])


class Permute(Fused, nf.flows.Permute):
    """A permutation of the channels, which disappears in the maps and couplings beside it."""

    mixes = False

    def parts(self, x: Tensor, sampling: bool) -> Iterable[Part] | None:
        if x.dim() > 4 or self.num_channels != x.shape[1]:
            return None
        if self.mode == "shuffle":
            return [Map(self, sampling)]
        half = self.num_channels // 2
        start = half if sampling else self.num_channels - half
        return [Shuffle((*range(start, self.num_channels), *range(start)), partial(call, self, sampling))]

    def kind(self) -> Hashable:
        return self.num_channels, self.perm.device

    def map_channels(self) -> int:
        return self.num_channels

    @staticmethod
    def stacked(layers: Sequence[Permute], inverse: bool) -> ChannelMap:
        identity = torch.eye(layers[0].num_channels, device=layers[0].perm.device)
        weight = torch.stack([identity[layer.perm if inverse else layer.inv_perm] for layer in layers])
        return ChannelMap(weight, None, weight.new_zeros(len(layers)))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,); alone it is a copy in any case."""
        return nf.flows.Permute.forward(self, z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,)."""
        return nf.flows.Permute.inverse(self, z, context)


class AffineCoupling(nf.flows.AffineCoupling):
    """The coupling of two separate parts."""

    def forward(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Latent [z1, z2] → data and log|det| (B,)."""
        found = self._couple(z, True)
        return super().forward(z) if found is None else found

    def inverse(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Data [z1, z2] → latent and log|det| (B,)."""
        found = self._couple(z, False)
        return super().inverse(z) if found is None else found

    def _couple(self, z: Sequence[Tensor], sampling: bool) -> tuple[list[Tensor], Tensor] | None:
        z1, z2 = z
        if not 2 <= z2.dim() <= 4:
            return None
        z2, log_det = _transform(self, z1, z2, sampling)
        return [z1, z2], log_det.to(z2.dtype)


class AffineCouplingBlock(Fused, nf.flows.AffineCouplingBlock):
    """Split, coupling and merge: without copies where the second half of the channels is transformed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flows[1].__class__ = AffineCoupling

    def parts(self, x: Tensor, sampling: bool) -> Iterable[Part] | None:
        if not 2 <= x.dim() <= 4:
            return None
        split, layer, _ = self.flows
        if split.mode == "channel":
            spec = _spec_of(layer, "channels_ceil")
            return [Coupling(partial(_raw_of_second_half, layer), spec, inverse=not sampling)]

        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            active, passive = _split(x, split.mode)
            active, log_det = _transform(layer, passive, active, sampling)
            return _merge(active, passive, split.mode), log_det

        return [Opaque(function)]


class GlowBlock(Fused, nf.flows.GlowBlock):
    """Coupling, 1 × 1 convolution and actnorm: the last two are one matrix, and the first runs in the same pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for inner in self.flows.modules():
            inner.__class__ = FAST_LAYERS.get(type(inner), type(inner))

    def parts(self, x: Tensor, sampling: bool) -> Iterable[Part] | None:
        return parts_of(self.flows if sampling else reversed(list(self.flows)), x, sampling)


def _transform(layer: nf.flows.AffineCoupling, passive: Tensor, active: Tensor,
               sampling: bool) -> tuple[Tensor, Tensor]:
    return coupling(active, _raw(layer, passive, active.shape), _spec_of(layer, "all"), inverse=not sampling)


def _raw(layer: nf.flows.AffineCoupling, passive: Tensor, shape: Sequence[int]) -> Tensor:
    """The network's output, for an active part of ``shape`` (B, C, …)."""
    raw = layer.param_map(passive)
    # Shifts may be the same for all pixels; scales may not, their log-det would be wrong.
    return raw if layer.scale or raw.shape == shape else raw.expand(shape)


def _raw_of_second_half(layer: nf.flows.AffineCoupling, x: Tensor) -> Tensor:
    passive = (x.shape[1] + 1) // 2
    return _raw(layer, x[:, :passive], (x.shape[0], x.shape[1] - passive, *x.shape[2:]))


def _spec_of(layer: nf.flows.AffineCoupling, active: str) -> CouplingSpec:
    return _spec(SCALE_MAPS[layer.scale_map] if layer.scale else "none", active)


FAST_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nf.flows.ActNorm: ActNorm,
    nf.flows.AffineConstFlow: AffineConstFlow,
    nf.flows.AffineCoupling: AffineCoupling,
    nf.flows.AffineCouplingBlock: AffineCouplingBlock,
    nf.flows.GlowBlock: GlowBlock,
    nf.flows.Invertible1x1Conv: Invertible1x1Conv,
    nf.flows.Permute: Permute,
    nf.nets.ConvNet2d: ConvNet2d,
}
"""From the stock class to the fast one."""


@lru_cache
def _spec(scale_map: str, active: str) -> CouplingSpec:
    return CouplingSpec(scale_map=scale_map, layout="interleaved", shift_first=True, active=active)


def _split(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """The active part and the passive one."""
    if mode == "channel_inv":
        active, passive = x.chunk(2, dim=1)
        return active, passive
    first, second = checkerboard.split(x)
    return (first, second) if mode == "checkerboard_inv" else (second, first)


def _merge(active: Tensor, passive: Tensor, mode: str) -> Tensor:
    if mode == "channel_inv":
        return torch.cat([active, passive], dim=1)
    return checkerboard.merge(active, passive) if mode == "checkerboard_inv" else checkerboard.merge(passive, active)
