"""Mix-ins for the layers of chaiyujin/glow-pytorch and y0ast/Glow-PyTorch, which add to a log-det that they are given:
``forward(input, logdet=None, reverse=False) → (output, logdet)``."""

from __future__ import annotations

from typing import Any, Hashable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._folding import ChannelMap
from ...nn._fusion import Evaluated, Opaque
from ...nn._hooks import is_watched
from ...ops import actnorm, lu
from .._chain import Map, Orders, Part, plu, undone, zeros
from .port import Port, evaluate_as_stock

__all__ = ["ORIGIN", "ActNorm2d", "Conv2d", "InvertibleConv1x1", "Layer", "LogDet", "Permute2d", "parts_of"]

LogDet = Tensor | float | None
"""(B,), 0-dim or a number to add to; None: nobody asks."""

ORIGIN = "chaiyujin/glow-pytorch and y0ast/Glow-PyTorch"


class Layer(Port):
    """What its layers share: a direction is its parts, fused."""

    origin = ORIGIN
    methods = {"forward": ("input", "logdet", "reverse")}

    def forward(self, input: Tensor, logdet: LogDet = None, reverse: bool = False) -> tuple[Tensor, LogDet]:
        return self._evaluate(input, logdet, reverse)

    def _evaluate(self, x: Tensor, log_det: LogDet, inverse: bool) -> tuple[Tensor, LogDet]:
        y, term = evaluate_as_stock(self.parts(inverse), x)
        return y, None if log_det is None else log_det + term

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        given = x.flatten(1).sum(dim=1)
        return [*module(x, given), *module(x, logdet=given, reverse=True)]


class ActNorm2d(Layer):
    """(x + bias) · e^logs."""

    mixes = False
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
        if module.inited:
            return None
        return "is not initialised from data yet; run one batch in train mode, then accelerate again"

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
        return [Map(self, inverse)]

    def kind(self) -> Hashable:
        return self.map_channels(), self.logs.dtype, self.logs.device

    def map_channels(self) -> int:
        return self.logs.numel()

    def tensors(self) -> Sequence[Tensor]:
        return self.bias, self.logs

    def alone(self, x: Tensor, inverse: bool) -> Evaluated:
        log_scale, bias = self.logs.flatten(), self.bias.flatten()
        return actnorm(x, -log_scale, -bias) if inverse else actnorm(x, log_scale, bias * log_scale.exp())

    @staticmethod
    def stacked(layers: Sequence[ActNorm2d], inverse: bool) -> ChannelMap:
        bias, log_scale = (torch.stack(tensors).flatten(1) for tensors in zip(*(layer.tensors() for layer in layers)))
        if inverse:
            return ChannelMap(torch.exp(-log_scale.double()), -bias, -log_scale.sum(dim=1))
        scale = log_scale.exp()
        return ChannelMap(scale, bias * scale, log_scale.sum(dim=1))


class InvertibleConv1x1(Layer):
    """W x per pixel, with W free or P L (U + diag(±e^s))."""

    mixes = True

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
        return [Map(self, inverse)]

    def kind(self) -> Hashable:
        tensors = self.tensors()
        return len(tensors), self.map_channels(), tensors[0].dtype, tensors[0].device

    def map_channels(self) -> int:
        return self.tensors()[0].shape[0]

    def tensors(self) -> Sequence[Tensor]:
        if "weight" in self._parameters:
            return (self.weight,)
        lower, upper = (getattr(self, name) for name in _triangle_names(self))
        return self.p, lower, upper, self.sign_s, self.log_s

    @staticmethod
    def stacked(layers: Sequence[InvertibleConv1x1], inverse: bool) -> ChannelMap:
        tensors = [torch.stack(tensors) for tensors in zip(*(layer.tensors() for layer in layers))]
        maps = plu(*tensors) if len(tensors) > 1 else ChannelMap(tensors[0], None, lu(tensors[0])[0])
        return undone(maps, "InvertibleConv1x1") if inverse else maps


def _triangle_names(module: nn.Module) -> tuple[str, str]:
    return ("l", "u") if hasattr(module, "l") else ("lower", "upper")


class Permute2d(Layer):
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
        order = tuple(self.indices.tolist())  # an attribute that anything may write to
        known = vars(self).get("_fused_orders")
        if known is None or known.forward.order != order:
            known = vars(self)["_fused_orders"] = Orders(order)
        return [known.inverse if inverse else known.forward]


class Conv2d(Port):
    """A convolution of a network and the actnorm behind it, as one convolution."""

    origin = ORIGIN
    methods = {"forward": ("input",)}
    attributes = ("do_actnorm",)

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"weight": tuple(module.weight.shape)} if isinstance(module, nn.Conv2d) else {}

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        if _convolution(module).padding_mode != "zeros" or _convolution(module).bias is not None:
            raise AttributeError("its convolution has a bias, or pads with something else than zeros")
        return ({} if isinstance(module, nn.Conv2d) else {"conv": ()}) | {"actnorm": (ActNorm2d,)}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return _convolution(module).in_channels

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        return [module(x)]

    def forward(self, input: Tensor) -> Tensor:
        conv, norm = _convolution(self), self.actnorm
        if not norm.inited or is_watched(norm) or (conv is not self and is_watched(conv)):
            return super(Port, self).forward(input)
        weight, bias = self._folded()
        return F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _folded(self) -> tuple[Tensor, Tensor]:
        norm = self.actnorm
        scale = norm.logs.exp()
        return _convolution(self).weight * scale.view(-1, 1, 1, 1), (norm.bias * scale).flatten()


def _convolution(module: nn.Module) -> nn.Conv2d:
    """Itself in one port, a child in the other."""
    return module if isinstance(module, nn.Conv2d) else module.conv


def parts_of(layers: Iterable[nn.Module], inverse: bool) -> list[Part]:
    """Of ``layers``, which are in the order data → latent."""
    parts: list[Part] = []
    for layer in list(layers)[::-1] if inverse else layers:
        fused = isinstance(layer, Port) and not is_watched(layer)
        parts += layer.parts(inverse) if fused else [_called(layer, inverse)]
    return parts


def _called(layer: nn.Module, inverse: bool) -> Opaque:
    """A layer that keeps its class, or has yet to initialise itself."""
    def evaluate(x: Tensor) -> Evaluated:
        if hasattr(layer, "indices"):
            return layer(x, inverse), zeros(x)
        return layer(x, zeros(x), inverse)

    return Opaque(evaluate)
