"""Convolutional networks inside layers that run fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .report import Match

__all__ = ["Sequential", "is_reordered", "match"]

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)
_COMPUTES_CHANNELS_LAST = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
"""Whether a processor's convolutions reorder other activations to it and back. With AVX2 that is quicker still."""
_PIXELS_WORTH_REORDERING = 512
"""Of a whole batch: with fewer, weights take longer to reorder than activations."""


class Sequential(nn.Sequential):
    """Convolutions and activations, where each activation overwrites what it is of.

    On processors with AVX-512 activations are channels_last inside, the order that their convolutions compute in.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → what the stock container returns."""
        if not is_reordered(input):
            return self._activated(input)
        return self._activated(input.contiguous(memory_format=torch.channels_last)).contiguous()

    def _activated(self, x: Tensor) -> Tensor:
        before = None
        for layer in self:
            # No convolution needs its output for its gradient; a negative slope would need the activation's input.
            slope = getattr(layer, "negative_slope", 0.0)
            fresh = type(before) is nn.Conv2d and type(layer) in _ACTIVATIONS and slope >= 0
            if fresh and not (_is_watched(before) or _is_watched(layer)):
                x = nn.functional.leaky_relu_(x, slope) if slope else x.relu_()
            else:
                x = layer(x)
            before = layer
        return x


def is_reordered(x: Tensor) -> bool:
    """Whether every convolution of a network would reorder its input, of the batch and size of ``x``, and its output."""
    return (_COMPUTES_CHANNELS_LAST and x.device.type == "cpu" and x.dtype is torch.float32 and x.dim() == 4
            and x.shape[0] * x.shape[2] * x.shape[3] >= _PIXELS_WORTH_REORDERING
            and not x.is_contiguous(memory_format=torch.channels_last))


def match(module: nn.Module) -> Match | None:
    """What takes the place of ``module``, a part of a network that a fused layer calls; None: it stays as it is."""
    layers = list(module) if type(module) is nn.Sequential else []
    known = all(type(layer) in (nn.Conv2d, *_ACTIVATIONS) or _is_zero_convolution(layer) for layer in layers)
    return Match(Sequential) if known and sum(type(layer) is nn.Conv2d for layer in layers) > 1 else None


def _is_zero_convolution(layer: nn.Module) -> bool:
    """Of rosinality/glow-pytorch: padding, a convolution and scales, which follow any memory format."""
    return type(layer).__name__ == "ZeroConv2d" and [type(child) for child in layer.children()] == [nn.Conv2d]


def _is_watched(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
