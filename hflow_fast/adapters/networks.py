"""Networks inside layers that run fused: the same operations, with fewer passes over their activations."""

from __future__ import annotations

from functools import partial
from typing import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._processor import CONVOLVES_CHANNELS_LAST
from ..nn._fusion import is_altered
from .report import Match

__all__ = ["Sequential", "call_network", "in_quickest_order", "match"]

_PIXELS_WORTH_REORDERING = 512
"""Of a whole batch: with fewer, weights take longer to reorder than activations."""
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)
_IN_ANY_ORDER = (nn.Conv2d, *_ACTIVATIONS, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity,
                 nn.BatchNorm2d, nn.Dropout, nn.Dropout2d)
"""Layers that give the same whatever the order in memory, and keep that order."""


class Sequential(nn.Sequential):
    """Convolutions and activations, where each activation overwrites what it is of.

    On processors with AVX-512 activations are channels_last inside, the order that their convolutions compute in.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → what the stock container returns."""
        return _evaluated(self, input)


def call_network(network: nn.Module, x: Tensor) -> Tensor:
    """``network(x)``, an ``nn.Sequential`` without hooks as a :class:`Sequential`."""
    if type(network) is not nn.Sequential or is_altered(network) or any(map(is_altered, network)):
        return network(x)
    return _evaluated(network, x)


def in_quickest_order(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` of convolutions and layers that keep the order in memory of what they are given."""
    if not _is_reordered(x):
        return function(x)
    return function(x.contiguous(memory_format=torch.channels_last)).contiguous()


def match(module: nn.Module) -> Match | None:
    """What takes the place of ``module``, a part of a network that a fused layer calls; None: it stays as it is."""
    layers = list(module) if type(module) is nn.Sequential else []
    known = all(type(layer) in (nn.Conv2d, *_ACTIVATIONS) or _is_zero_convolution(layer) for layer in layers)
    return Match(Sequential) if known and sum(type(layer) is nn.Conv2d for layer in layers) > 1 else None


def _evaluated(layers: nn.Sequential, x: Tensor) -> Tensor:
    overwriting = partial(_overwriting, layers)
    orderless = all(type(layer) in _IN_ANY_ORDER or _is_zero_convolution(layer) for layer in layers)
    return in_quickest_order(overwriting, x) if orderless else overwriting(x)


def _overwriting(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    before = None
    for layer in layers:
        # No convolution or product needs its output for its gradient; a negative slope would need what is overwritten.
        slope = getattr(layer, "negative_slope", 0.0)
        fresh = type(before) in (nn.Conv2d, nn.Linear) and type(layer) in _ACTIVATIONS and slope >= 0
        if fresh and not (is_altered(before) or is_altered(layer)):
            x = F.leaky_relu(x, slope, inplace=True) if slope else F.relu(x, inplace=True)
        else:
            x = layer(x)
        before = layer
    return x


def _is_reordered(x: Tensor) -> bool:
    """Whether every convolution of a network would reorder what it takes, of the size of ``x``, and what it returns."""
    return (CONVOLVES_CHANNELS_LAST and x.device.type == "cpu" and x.dtype is torch.float32 and x.dim() == 4
            and x.shape[0] * x.shape[2] * x.shape[3] >= _PIXELS_WORTH_REORDERING
            and not x.is_contiguous(memory_format=torch.channels_last))


def _is_zero_convolution(layer: nn.Module) -> bool:
    """Of rosinality/glow-pytorch: padding, a convolution and scales, which follow any memory format."""
    return type(layer).__name__ == "ZeroConv2d" and [type(child) for child in layer.children()] == [nn.Conv2d]
