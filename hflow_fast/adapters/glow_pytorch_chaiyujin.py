"""Mix-ins for the classes of chaiyujin/glow-pytorch and y0ast/Glow-PyTorch, which add to a log-det that they are given:
``forward(input, logdet=None, reverse=False) → (output, logdet)``."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..nn._fusion import ChannelMap, Coupling, Evaluated, Opaque
from ..nn._inversion import invert
from ..ops import CouplingSpec, actnorm, lu
from ._folding import Part, Shuffle, affine_of_inverse, without_autocast
from ._state import cache_of
from .accelerate import stock_class
from .glow_pytorch_port import Port, evaluate, first_convolution_inputs, is_watched, normal_log_prob, zeros

__all__ = ["ActNorm2d", "FlowNet", "FlowStep", "InvertibleConv1x1", "Permute2d", "Split2d", "SqueezeLayer"]

LogDet = Tensor | float | None
"""(B,), 0-dim or a number to add to; None: nobody asks."""

_AFFINE = CouplingSpec("sigmoid", layout="interleaved", shift_first=True, form="add_scale", active="channels")
_ADDITIVE = CouplingSpec("none", active="channels")
_PRIOR = CouplingSpec("exp", layout="interleaved", shift_first=True)
_ORIGIN = "chaiyujin/glow-pytorch and y0ast/Glow-PyTorch"


class _Layer(Port):
    """What its layers share: a direction is its parts, fused."""

    origin = _ORIGIN
    methods = {"forward": ("input", "logdet", "reverse")}

    def forward(self, input: Tensor, logdet: LogDet = None, reverse: bool = False) -> tuple[Tensor, LogDet]:
        return self._evaluate(input, logdet, reverse)

    def _evaluate(self, x: Tensor, log_det: LogDet, inverse: bool) -> tuple[Tensor, LogDet]:
        with without_autocast(x):
            parts = self.parts(inverse)
        y, term = evaluate(self, f"inverse {inverse}", x, parts)
        return y, None if log_det is None else log_det + term

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        given = torch.arange(float(x.shape[0]), device=x.device)
        return [*module(x, given), *module(x, logdet=given, reverse=True)]


class ActNorm2d(_Layer):
    """(x + bias) · e^logs."""

    attributes = ("inited", "num_features", "initialize_parameters", "_check_input_dim")

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("bias", "logs"), (1, cls.channels(module), 1, 1))

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return module.bias.numel()

    @classmethod
    def prepare(cls, twin: nn.Module) -> None:
        twin.inited = True

    @classmethod
    def readiness(cls, module: nn.Module) -> str | None:
        if module.inited or not module.training:
            return None
        return "is not yet initialised from data; run a batch through the model in train mode, then accelerate it again"

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        return [*super().run_trial(module, x), *module(x), *module(x, reverse=True)]

    def forward(self, input: Tensor, logdet: LogDet = None, reverse: bool = False) -> tuple[Tensor, LogDet]:
        if not self.inited:
            return super(Port, self).forward(input, logdet, reverse)  # the stock class's, which initialises
        self._check_input_dim(input)
        return self._evaluate(input, logdet, reverse)

    def parts(self, inverse: bool) -> list[Part]:
        if not self.inited:
            return [_called(self, inverse)]
        return [cache_of(self).get(f"map {inverse}", [self.bias, self.logs], functools.partial(self._map, inverse))]

    def _map(self, inverse: bool) -> ChannelMap:
        log_scale, bias = self.logs.flatten(), self.bias.flatten()
        log_det = log_scale.sum()
        if inverse:
            log_scale, shift, log_det = -log_scale.double(), -bias.double(), -log_det
        else:
            shift = bias * log_scale.exp()
        return ChannelMap(log_scale.exp(), shift, log_det,
                          functools.partial(_apply_actnorm, log_scale=log_scale, bias=shift))


def _apply_actnorm(x: Tensor, log_scale: Tensor, bias: Tensor) -> Evaluated:
    return actnorm(x, log_scale.to(x.dtype), bias.to(x.dtype))


class InvertibleConv1x1(_Layer):
    """W x per pixel, with W free or P L (U + diag(±e^s))."""

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        channels = cls.channels(module)
        matrix, vector = (channels, channels), (channels,)
        if hasattr(module, "weight"):
            return {"weight": matrix}
        return {"p": matrix, "sign_s": vector, "log_s": vector, **dict.fromkeys(_triangle_names(module), matrix)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return module.weight.shape[0] if hasattr(module, "weight") else module.log_s.numel()

    def parts(self, inverse: bool) -> list[Part]:
        if hasattr(self, "weight"):
            tensors = [self.weight]
        else:
            tensors = [self.p, self.sign_s, self.log_s, *(getattr(self, name) for name in _triangle_names(self))]
        return [cache_of(self).get(f"map {inverse}", tensors, self._inverse_map if inverse else self._map)]

    def _map(self) -> ChannelMap:
        if hasattr(self, "weight"):
            return ChannelMap(self.weight, None, lu(self.weight)[0])
        lower, upper = (getattr(self, name) for name in _triangle_names(self))
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        weight = self.p @ (lower.tril(-1) + identity) @ (upper.triu(1) + torch.diag(self.sign_s * self.log_s.exp()))
        return ChannelMap(weight, None, self.log_s.sum())

    def _inverse_map(self) -> ChannelMap:
        weight, bias, log_det = self.parts(False)[0][:3]
        return affine_of_inverse(invert(weight, type(self).__name__), bias, log_det)


def _triangle_names(module: nn.Module) -> tuple[str, str]:
    return ("l", "u") if hasattr(module, "l") else ("lower", "upper")


class _Orders:
    """The last orders of a permutation, which lie in an attribute that anything may write to."""

    def __init__(self, order: tuple[int, ...]) -> None:
        self.forward = Shuffle(order)
        self.inverse = self.forward.inverted


class Permute2d(_Layer):
    """A fixed permutation of channels, ``forward(input, reverse=False) → output``."""

    methods = {"forward": ("input", "reverse")}
    attributes = ("indices", "indices_inverse")

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return len(module.indices)

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        return [module(x), module(x, True)]

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor:
        return self._evaluate(input, None, reverse)[0]

    def parts(self, inverse: bool) -> list[Part]:
        order = tuple(self.indices.tolist())
        known = vars(self).get("_fused_orders")
        if known is None or known.forward.order != order:
            known = vars(self)["_fused_orders"] = _Orders(order)
        return [known.inverse if inverse else known.forward]


_PERMUTATIONS = {"invconv": InvertibleConv1x1, "shuffle": Permute2d, "reverse": Permute2d}


class FlowStep(_Layer):
    """Actnorm; a 1 × 1 convolution or a permutation; (b + t) · σ(s + 2) with s and t from a network of a, or b + t."""

    methods = _Layer.methods | {"normal_flow": ("input", "logdet"), "reverse_flow": ("input", "logdet")}
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

    def normal_flow(self, input: Tensor, logdet: LogDet) -> tuple[Tensor, LogDet]:
        return self._evaluate(input, logdet, False)

    def reverse_flow(self, input: Tensor, logdet: LogDet) -> tuple[Tensor, LogDet]:
        return self._evaluate(input, logdet, True)

    def parts(self, inverse: bool) -> list[Part]:
        network = getattr(self, _network_name(self))
        coupling = Coupling(lambda x: network(x[:, : x.shape[1] // 2]),
                            _AFFINE if self.flow_coupling == "affine" else _ADDITIVE, inverse)
        maps = _parts_of([self.actnorm, getattr(self, _permutation_name(self))], inverse)
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

    origin = _ORIGIN
    methods = _Layer.methods
    attributes = ("factor",)

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return 2 * module.factor**2

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        x = x.repeat(1, 1, module.factor, module.factor) * torch.arange(1.0, x.shape[-1] * module.factor + 1).to(x)
        return [module(x)[0], module(x, reverse=True)[0], module(x, x[:, 0, 0, 0])[1]]

    def forward(self, input: Tensor, logdet: LogDet = None, reverse: bool = False) -> tuple[Tensor, LogDet]:
        change = nn.functional.pixel_shuffle if reverse else nn.functional.pixel_unshuffle
        return change(input, self.factor), logdet


class Split2d(Port):
    """Half of the channels go on; the other half counts by a Gaussian that a convolution of the first predicts."""

    origin = _ORIGIN
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
        return list(module(x, torch.arange(float(x.shape[0]), device=x.device)))

    def forward(self, input: Tensor, logdet: LogDet = 0.0, reverse: bool = False, *temperature: float | None,
                **named: float | None) -> tuple[Tensor, LogDet]:
        if reverse:  # draws the random numbers that the stock class draws
            return super(Port, self).forward(input, logdet, reverse, *temperature, **named)
        z1, z2 = input[:, : input.shape[1] // 2], input[:, input.shape[1] // 2 :]
        return z1, normal_log_prob(z2, self.conv(z1), _PRIOR) + logdet


class FlowNet(Port):
    """Squeezes, flow steps and splits; flow steps fused with their neighbours."""

    origin = _ORIGIN
    methods = {"encode": ("z", "logdet")}

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
        given = torch.arange(float(x.shape[0]), device=x.device)
        z, log_det = module(x, given)
        return [z, log_det, module(z, given, True, 0.7)]

    def encode(self, z: Tensor, logdet: LogDet = 0.0) -> tuple[Tensor, LogDet]:
        for name, fused, layers in _chains(self.layers):
            if fused:
                z, term = _run_chain(self, f"encode {name}", z, layers, False)
                logdet = logdet + term
                continue
            for layer in layers:
                z, logdet = layer(z, logdet, reverse=False)
        return z, logdet

    def decode(self, z: Tensor, *temperature: float | None, **named: float | None) -> Tensor:
        # The ports call it differently, and pass it on to Split2d as its last argument.
        (temperature,) = (*temperature, *named.values()) or (None,)
        for name, fused, layers in _chains(list(self.layers)[::-1]):
            if fused:
                z = _run_chain(self, f"decode {name}", z, layers[::-1], True)[0]
                continue
            for layer in layers:
                z = layer(z, 0, True, temperature)[0] if _is_split(layer) else layer(z, logdet=0, reverse=True)[0]
        return z


def _is_split(layer: nn.Module) -> bool:
    return hasattr(layer, "split2d_prior")


def _chains(layers: Iterable[nn.Module]) -> Iterator[tuple[int, bool, list[nn.Module]]]:
    """A number, whether they are fused, and the layers, for each chain of layers that are or are not."""
    chains = itertools.groupby(layers, key=lambda layer: isinstance(layer, FlowStep) and not is_watched(layer))
    for number, (fused, chain) in enumerate(chains):
        yield number, fused, list(chain)


def _run_chain(owner: nn.Module, name: str, x: Tensor, layers: list[nn.Module], inverse: bool) -> Evaluated:
    with without_autocast(x):
        parts = _parts_of(layers, inverse)
    return evaluate(owner, name, x, parts)


def _parts_of(layers: Iterable[nn.Module], inverse: bool) -> list[Part]:
    """Of ``layers``, which are in the order data → latent."""
    parts: list[Part] = []
    for layer in list(layers)[::-1] if inverse else layers:
        parts += layer.parts(inverse) if isinstance(layer, Port) and not is_watched(layer) else [_called(layer, inverse)]
    return parts


def _called(layer: nn.Module, inverse: bool) -> Opaque:
    """A layer that keeps its class, or has yet to initialise itself."""
    def evaluate(x: Tensor) -> Evaluated:
        if hasattr(layer, "indices"):
            return layer(x, inverse), zeros(x)
        return layer(x, zeros(x), inverse)

    return Opaque(evaluate)
