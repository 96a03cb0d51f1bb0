"""Mix-ins for the flow steps of chaiyujin/glow-pytorch and y0ast/Glow-PyTorch, and for what chains them."""

from __future__ import annotations

import inspect
import itertools
from types import FunctionType
from typing import Any, Iterable, Iterator

from torch import Tensor, nn

from ...nn._fusion import Coupling
from ...nn._hooks import is_watched
from ...nn.reshape import squeezed, unsqueezed
from ...ops import CouplingSpec
from .._chain import Part, evaluate
from ..accelerate import stock_class
from .chaiyujin_layers import ORIGIN, ActNorm2d, InvertibleConv1x1, Layer, LogDet, Permute2d, parts_of
from .port import Port, evaluate_as_stock, first_convolution_inputs, normal_log_prob

__all__ = ["FlowNet", "FlowStep", "Split2d", "SqueezeLayer"]

_AFFINE = CouplingSpec("sigmoid", layout="interleaved", shift_first=True, form="add_scale", active="channels")
_ADDITIVE = CouplingSpec("none", active="channels")
_PRIOR = CouplingSpec("exp", layout="interleaved", shift_first=True)
_PERMUTATIONS = {"invconv": InvertibleConv1x1, "shuffle": Permute2d, "reverse": Permute2d}


class FlowStep(Layer):
    """Actnorm; a 1 × 1 convolution or a permutation; (b + t) · σ(s + 2) with s and t from a network of a, or b + t."""

    methods = Layer.methods | {"normal_flow": ("input", "logdet"), "reverse_flow": ("input", "logdet")}
    attributes = ("flow_coupling", "flow_permutation")

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        permutation = _permutation_name(module)
        return {"actnorm": (ActNorm2d,), permutation: (_PERMUTATIONS[permutation],), _network_name(module): ()}

    @classmethod
    def networks(cls, module: nn.Module) -> dict[str, tuple[int, int]]:
        channels = cls.channels(module)
        return {_network_name(module): (channels // 2, channels if module.flow_coupling == "affine" else channels // 2)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return ActNorm2d.channels(module.actnorm)

    @classmethod
    def readiness(cls, module: nn.Module) -> str | None:
        # y0ast's layers hold a function that refers to them; a deepcopy holds the same one.
        held = module.flow_permutation
        if isinstance(held, FunctionType) and not any(cell.cell_contents is module for cell in held.__closure__ or ()):
            return "its flow_permutation is that of another layer, as in a deepcopy; build it anew and load its state"
        return None

    def normal_flow(self, input: Tensor, logdet: LogDet) -> tuple[Tensor, LogDet]:
        return self._evaluate(input, logdet, False)

    def reverse_flow(self, input: Tensor, logdet: LogDet) -> tuple[Tensor, LogDet]:
        return self._evaluate(input, logdet, True)

    def parts(self, inverse: bool) -> list[Part]:
        network = getattr(self, _network_name(self))
        coupling = Coupling(lambda x: network(x[:, : x.shape[1] // 2]),
                            _AFFINE if self.flow_coupling == "affine" else _ADDITIVE, inverse)
        maps = parts_of([self.actnorm, getattr(self, _permutation_name(self))], inverse)
        return [coupling, *maps] if inverse else [*maps, coupling]


def _permutation_name(module: nn.Module) -> str:
    found = [name for name in _PERMUTATIONS if name in module._modules]
    if len(found) != 1:
        raise AttributeError(f"it has {len(found)} of {', '.join(_PERMUTATIONS)}")
    return found[0]


def _network_name(module: nn.Module) -> str:
    return "f" if "f" in module._modules else "block"


class SqueezeLayer(Port):
    """(B, C, H, W) ↔ (B, C·f², H/f, W/f)."""

    origin = ORIGIN
    methods = Layer.methods
    attributes = ("factor",)

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return 2 * module.factor**2

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        x = x.repeat(1, 1, module.factor, module.factor) * x.new_tensor(range(1, x.shape[-1] * module.factor + 1))
        return [module(x)[0], module(x, reverse=True)[0], module(x, x[:, 0, 0, 0])[1]]

    def forward(self, input: Tensor, logdet: LogDet = None, reverse: bool = False) -> tuple[Tensor, LogDet]:
        return (unsqueezed if reverse else squeezed)(input, self.factor), logdet


class Split2d(Port):
    """Half of the channels go on; the other half counts by a Gaussian that a convolution of the first predicts."""

    origin = ORIGIN
    methods = {"split2d_prior": ("z",)}

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        arguments = tuple(inspect.signature((stock_class(module) or type(module)).forward).parameters)
        if arguments[2:-1] != ("logdet", "reverse"):
            raise AttributeError(f"its forward() takes ({', '.join(arguments[1:])})")
        return {"conv": ()}

    @classmethod
    def networks(cls, module: nn.Module) -> dict[str, tuple[int, int]]:
        return {"conv": (cls.channels(module) // 2, cls.channels(module))}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return 2 * first_convolution_inputs(module.conv)

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        return list(module(x, x.flatten(1).sum(dim=1)))

    def forward(self, input: Tensor, logdet: LogDet = 0.0, reverse: bool = False, *temperature: float | None,
                **named: float | None) -> tuple[Tensor, LogDet]:
        if reverse:  # draws the random numbers that the stock class draws
            return super(Port, self).forward(input, logdet, reverse, *temperature, **named)
        z1, z2 = input[:, : input.shape[1] // 2], input[:, input.shape[1] // 2 :]
        return z1, normal_log_prob(z2, self.conv(z1), _PRIOR) + logdet


class FlowNet(Port):
    """Squeezes, flow steps and splits; flow steps fused with their neighbours."""

    origin = ORIGIN
    methods = {"encode": ("z", "logdet")}
    overrides = ("decode",)

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        return {"layers": (SqueezeLayer, FlowStep, Split2d)}

    @classmethod
    def enough(cls, children: list[nn.Module]) -> list[nn.Module]:
        chosen: list[nn.Module] = []
        squeezes = 0
        for child in children:
            squeezes += hasattr(child, "factor")
            if _is_split(child) and squeezes == 2:
                break
            if not (hasattr(child, "actnorm") and [hasattr(last, "actnorm") for last in chosen[-2:]] == [True, True]):
                chosen.append(child)
        return chosen

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return next(FlowStep.channels(layer) for layer in module.layers if hasattr(layer, "actnorm")) // 4

    @classmethod
    def called(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        return tuple(module.layers)

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        given = x.flatten(1).sum(dim=1)
        z, log_det = module(x, given)
        return [z, log_det, module(z, given, True, 0.7)]

    def encode(self, z: Tensor, logdet: LogDet = 0.0) -> tuple[Tensor, LogDet]:
        for fused, layers in _chains(self.layers):
            if fused:
                z, term = evaluate_as_stock(parts_of(layers, False), z)
                logdet = logdet + term
                continue
            for layer in layers:
                z, logdet = layer(z, logdet, reverse=False)
        return z, logdet

    def decode(self, z: Tensor, *temperature: float | None, **named: float | None) -> Tensor:
        # The ports call it differently, and pass it on to Split2d as its last argument.
        (temperature,) = (*temperature, *named.values()) or (None,)
        for fused, layers in _chains(list(self.layers)[::-1]):
            if fused:
                z = evaluate(parts_of(layers[::-1], True), z)[0]
                continue
            for layer in layers:
                z = layer(z, 0, True, temperature)[0] if _is_split(layer) else layer(z, logdet=0, reverse=True)[0]
        return z


def _is_split(layer: nn.Module) -> bool:
    return hasattr(layer, "split2d_prior")


def _chains(layers: Iterable[nn.Module]) -> Iterator[tuple[bool, list[nn.Module]]]:
    """Whether they are fused, and the layers, for each chain of layers that are or are not."""
    chains = itertools.groupby(layers, key=lambda layer: isinstance(layer, FlowStep) and not is_watched(layer))
    return ((fused, list(chain)) for fused, chain in chains)
