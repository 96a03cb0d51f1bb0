"""Mix-ins for rosinality/glow-pytorch: ``forward(input) → (out, logdet)``, ``reverse(output) → input``."""

from __future__ import annotations

import math
from typing import Any, Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ...nn._folding import ChannelMap
from ...nn._fusion import Coupling, Evaluated, Opaque
from ...nn._hooks import is_watched
from ...nn.reshape import squeezed, unsqueezed
from ...ops import CouplingSpec, coupling, lu
from .._chain import Map, Part, evaluate, plu, undone, zeros
from .._state import is_set
from .port import Port, evaluate_as_stock, first_convolution_inputs, normal_log_prob

__all__ = ["ActNorm", "AffineCoupling", "Block", "Flow", "InvConv2d", "InvConv2dLU"]

_AFFINE = CouplingSpec("sigmoid", form="add_scale", active="channels")
_ADDITIVE = CouplingSpec("none", active="channels")
_PRIOR = CouplingSpec("exp", shift_first=True)


class _Layer(Port):
    """What its layers share: a direction is its parts, fused."""

    origin = "rosinality/glow-pytorch"
    methods = {"forward": ("input",), "reverse": ("output",)}

    def forward(self, input: Tensor) -> Any:
        return self._evaluate(input, False)

    def reverse(self, output: Tensor) -> Tensor:
        return self._evaluate(output, True)[0]

    def _evaluate(self, x: Tensor, inverse: bool) -> Evaluated:
        return evaluate_as_stock(self.parts(inverse), x)

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        result = module(x)
        return [*(result if isinstance(result, tuple) else (result,)), module.reverse(x)]


class ActNorm(_Layer):
    """scale · (x + loc), with a scale of either sign."""

    mixes = False
    attributes = ("logdet",)

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        shape = (1, module.loc.numel(), 1, 1)
        return {"loc": shape, "scale": shape, "initialized": ()}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return module.loc.numel()

    @classmethod
    def example(cls, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        values = super().example(name, shape, generator)
        if name == "scale":
            values = 1 + values
            values[:, ::2] *= -1
        return values

    @classmethod
    def prepare(cls, twin: nn.Module) -> None:
        twin.initialized.fill_(1)

    @classmethod
    def readiness(cls, module: nn.Module) -> str | None:
        if module.initialized.is_meta or module.initialized:
            return None
        return "is not initialised from data yet; run one batch, then accelerate again"

    def forward(self, input: Tensor) -> Any:
        if not is_set(self, "initialized"):
            return super(Port, self).forward(input)  # the stock class's, which initialises
        out, log_det = self._evaluate(input, False)
        return (out, log_det) if self.logdet else out

    def parts(self, inverse: bool) -> list[Part]:
        if not inverse and not is_set(self, "initialized"):
            return [_called(self, inverse)]
        return [Map(self, inverse)]

    def kind(self) -> Hashable:
        return self.map_channels(), self.scale.dtype, self.scale.device

    def map_channels(self) -> int:
        return self.loc.numel()

    def alone(self, x: Tensor, inverse: bool) -> Evaluated:
        log_det = self.scale.abs().log().sum() * math.prod(x.shape[2:])
        y = x / self.scale - self.loc if inverse else torch.addcmul(self.scale * self.loc, self.scale, x)
        return y, (-log_det if inverse else log_det).expand(len(x))

    @staticmethod
    def stacked(layers: Sequence[ActNorm], inverse: bool) -> ChannelMap:
        scale, loc = (torch.stack(tensors).flatten(1) for tensors in zip(*(
            (layer.scale, layer.loc) for layer in layers)))
        log_det = scale.abs().log().sum(dim=1)
        if inverse:
            return ChannelMap(scale.double().reciprocal(), -loc, -log_det)
        return ChannelMap(scale, scale * loc, log_det)


class InvConv2d(_Layer):
    """A 1 × 1 convolution with a free matrix."""

    mixes = True

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"weight": (cls.channels(module), cls.channels(module), 1, 1)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return module.weight.shape[0]

    def parts(self, inverse: bool) -> list[Part]:
        return [Map(self, inverse)]

    def kind(self) -> Hashable:
        return self.map_channels(), self.weight.dtype, self.weight.device

    def map_channels(self) -> int:
        return self.weight.shape[0]

    @staticmethod
    def stacked(layers: Sequence[InvConv2d], inverse: bool) -> ChannelMap:
        weight = torch.stack([layer.weight for layer in layers])[..., 0, 0]
        maps = ChannelMap(weight, None, lu(weight)[0])
        return undone(maps, "InvConv2d") if inverse else maps


class InvConv2dLU(_Layer):
    """A 1 × 1 convolution with P L (U + diag(±e^s))."""

    mixes = True
    methods = _Layer.methods | {"calc_weight": ()}

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        channels = cls.channels(module)
        matrices = dict.fromkeys(("w_p", "w_l", "w_u", "u_mask", "l_mask", "l_eye"), (channels, channels))
        return matrices | {"w_s": (channels,), "s_sign": (channels,)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return module.w_s.numel()

    def parts(self, inverse: bool) -> list[Part]:
        return [Map(self, inverse)]

    def kind(self) -> Hashable:
        return self.map_channels(), self.w_s.dtype, self.w_s.device

    def map_channels(self) -> int:
        return self.w_s.numel()

    def tensors(self) -> Sequence[Tensor]:
        return self.w_p, self.w_l, self.w_u, self.s_sign, self.w_s

    @staticmethod
    def stacked(layers: Sequence[InvConv2dLU], inverse: bool) -> ChannelMap:
        maps = plu(*(torch.stack(tensors) for tensors in zip(*(layer.tensors() for layer in layers))))
        return undone(maps, "InvConv2dLU") if inverse else maps


class AffineCoupling(_Layer):
    """(b + t) · σ(s + 2), with s and t from a network of the first half of the channels; or b + t."""

    attributes = ("affine",)

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        return {"net": ()}

    @classmethod
    def networks(cls, module: nn.Module) -> dict[str, tuple[int, int]]:
        channels = cls.channels(module)
        return {"net": (channels // 2, channels if module.affine else channels // 2)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return 2 * first_convolution_inputs(module.net)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        out, log_det = self._evaluate(input, False)
        return out, log_det if self.affine else None

    def parts(self, inverse: bool) -> list[Part]:
        return [Coupling(lambda x: self.net(x[:, : x.shape[1] // 2]), _AFFINE if self.affine else _ADDITIVE, inverse)]


class Flow(_Layer):
    """Actnorm, 1 × 1 convolution, coupling."""

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        return {"actnorm": (ActNorm,), "invconv": (InvConv2d, InvConv2dLU), "coupling": (AffineCoupling,)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return module.actnorm.loc.numel()

    def parts(self, inverse: bool) -> list[Part]:
        return _parts_of([self.actnorm, self.invconv, self.coupling], inverse)


class Block(Port):
    """Squeeze, flows, and a Gaussian prior for one half of the channels or all: flows fused with their neighbours."""

    origin = _Layer.origin
    methods = {"forward": ("input",), "reverse": ("output", "eps", "reconstruct")}
    attributes = ("split",)

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        cls.channels(module)
        return {"flows": (Flow,), "prior": (_ZeroConv2d,)}

    @classmethod
    def networks(cls, module: nn.Module) -> dict[str, tuple[int, int]]:
        channels = Flow.channels(module.flows[0])
        inputs = channels // 2 if module.split else channels
        return {"prior": (inputs, 2 * inputs)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return Flow.channels(module.flows[0]) // 4

    @classmethod
    def enough(cls, children: list[nn.Module]) -> list[nn.Module]:
        return children[:2]

    @classmethod
    def called(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        return *module.flows, module.prior

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        out, log_det, log_p, z = module(x)
        previous = out if module.split else z
        return [out, log_det, log_p, z, module.reverse(previous, z), module.reverse(previous, z, reconstruct=True)]

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, log_det = evaluate_as_stock(_parts_of(self.flows, False), squeezed(input, 2))
        if self.split:
            out, z = out.chunk(2, 1)
            return out, log_det, normal_log_prob(z, self.prior(out), _PRIOR), z
        return out, log_det, normal_log_prob(out, self._prior_of_zeros(out), _PRIOR), out

    def reverse(self, output: Tensor, eps: Tensor | None = None, reconstruct: bool = False) -> Tensor:
        if reconstruct:
            z = eps
        else:
            z = coupling(eps, self.prior(output) if self.split else self._prior_of_zeros(output), _PRIOR)[0]
        z = torch.cat([output, z], 1) if self.split else z
        return unsqueezed(evaluate(_parts_of(self.flows, True), z)[0], 2)

    def _prior_of_zeros(self, like: Tensor) -> Tensor:
        """The same for every sample, so computed for one."""
        raw = self.prior(like.new_zeros(1, *like.shape[1:]))
        return raw.expand(like.shape[0], *raw.shape[1:])


class _ZeroConv2d(Port):
    """The network of a prior: nothing in it looks at a batch as a whole."""

    methods = {"forward": ("input",)}

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"scale": (1, module.conv.out_channels, 1, 1)}

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        return {"conv": ()}


def _parts_of(layers: Iterable[nn.Module], inverse: bool) -> list[Part]:
    """Of ``layers``, which are in the order data → latent."""
    parts: list[Part] = []
    for layer in list(layers)[::-1] if inverse else layers:
        # reverse() is a method like any other: it calls no hooks.
        fused = isinstance(layer, Port) and (inverse or not is_watched(layer))
        parts += layer.parts(inverse) if fused else [_called(layer, inverse)]
    return parts


def _called(layer: nn.Module, inverse: bool) -> Opaque:
    """A layer that keeps its class, or has yet to initialise itself."""
    def evaluate(x: Tensor) -> Evaluated:
        if inverse:
            return layer.reverse(x), zeros(x)
        out, log_det = layer(x)
        return out, zeros(x) if log_det is None else zeros(x) + log_det

    return Opaque(evaluate)
