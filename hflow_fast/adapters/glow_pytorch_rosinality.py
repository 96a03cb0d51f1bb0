"""Mix-ins for the classes of rosinality/glow-pytorch: ``forward(input) → (out, logdet)``, ``reverse(output) → input``."""

from __future__ import annotations

import functools
from typing import Any, Iterable

import torch
from torch import Tensor, nn

from ..nn._fusion import ChannelMap, Coupling, Evaluated, Opaque
from ..nn._inversion import invert
from ..ops import CouplingSpec, coupling, lu
from ._folding import Part, affine_of_inverse, without_autocast
from ._state import cache_of, is_set
from .glow_pytorch_port import Port, evaluate, first_convolution_inputs, is_watched, normal_log_prob, zeros

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
        with without_autocast(x):
            parts = self.parts(inverse)
        return evaluate(self, f"inverse {inverse}", x, parts)

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        result = module(x)
        return [*(result if isinstance(result, tuple) else (result,)), module.reverse(x)]


class ActNorm(_Layer):
    """scale · (x + loc), with a scale of either sign."""

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
        return "is not yet initialised from data; run a batch through the model, then accelerate it again"

    def forward(self, input: Tensor) -> Any:
        if not is_set(self, "initialized"):
    return super(Port, self).forward(input)  # the stock class's, which initialises
        out, log_det = self._evaluate(input, False)
        return (out, log_det) if self.logdet else out

    def parts(self, inverse: bool) -> list[Part]:
        if not inverse and not is_set(self, "initialized"):
            return [_called(self, inverse)]
        return [cache_of(self).get(f"map {inverse}", [self.loc, self.scale], functools.partial(self._map, inverse))]

    def _map(self, inverse: bool) -> ChannelMap:
        scale, loc = self.scale.flatten(), self.loc.flatten()
        log_det = scale.abs().log().sum()
        if inverse:
            return ChannelMap(scale.double().reciprocal(), -loc.double(), -log_det)
        return ChannelMap(scale, scale * loc, log_det)


class _Convolution(_Layer):
    """A 1 × 1 convolution of a matrix."""

    def _tensors(self) -> list[Tensor]:
        """What the matrix is made of."""
        raise NotImplementedError

    def _map(self) -> ChannelMap:
        raise NotImplementedError

    def _inverse_map(self) -> ChannelMap:
        weight, bias, log_det = self.parts(False)[0][:3]
        return affine_of_inverse(invert(weight, type(self).__name__), bias, log_det)

    def parts(self, inverse: bool) -> list[Part]:
        compute = self._inverse_map if inverse else self._map
        return [cache_of(self).get(f"map {inverse}", self._tensors(), compute)]


class InvConv2d(_Convolution):
    """A free matrix."""

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"weight": (cls.channels(module), cls.channels(module), 1, 1)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return module.weight.shape[0]

    def _tensors(self) -> list[Tensor]:
        return [self.weight]

    def _map(self) -> ChannelMap:
        weight = self.weight[:, :, 0, 0]
        return ChannelMap(weight, None, lu(weight)[0])


class InvConv2dLU(_Convolution):
    """P L (U + diag(±e^s))."""

    methods = _Layer.methods | {"calc_weight": ()}

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        channels = cls.channels(module)
        matrices = dict.fromkeys(("w_p", "w_l", "w_u", "u_mask", "l_mask", "l_eye"), (channels, channels))
        return matrices | {"w_s": (channels,), "s_sign": (channels,)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return module.w_s.numel()

    def _tensors(self) -> list[Tensor]:
        return [self.w_p, self.w_l, self.w_u, self.w_s, self.s_sign, self.u_mask, self.l_mask, self.l_eye]

    def _map(self) -> ChannelMap:
        return ChannelMap(self.calc_weight()[:, :, 0, 0], None, self.w_s.sum())


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
        squeezed = nn.functional.pixel_unshuffle(input, 2)
        with without_autocast(input):
            parts = _parts_of(self.flows, False)
        out, log_det = evaluate(self, "forward", squeezed, parts)
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
        with without_autocast(z):
            parts = _parts_of(self.flows, True)
        return nn.functional.pixel_shuffle(evaluate(self, "reverse", z, parts)[0], 2)

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
