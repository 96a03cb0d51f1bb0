"""Convolutional networks inside layers that run fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .report import Match

__all__ = ["Sequential", "as_convolutions_like", "match"]

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)
_FEW_PIXELS = 64
"""Images with fewer are as quick in the format in which they come."""


class Sequential(nn.Sequential):
    """Convolutions and activations: in the memory format that suits them, and each activation on what it is of."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → the same as the stock container, contiguous as there."""
        x = as_convolutions_like(input)
        before = None
        for layer in self:
            # No convolution needs its output for its gradient; a negative slope would need the activation's input.
            if type(before) is nn.Conv2d and type(layer) in _ACTIVATIONS and not _watched(before, layer):
                slope = getattr(layer, "negative_slope", 0.0)
                x = nn.functional.leaky_relu(x, slope, inplace=slope >= 0) if slope else x.relu_()
            else:
                x = layer(x)
            before = layer
        return x.contiguous() if _is_formatted(input) else x


def as_convolutions_like(x: Tensor) -> Tensor:
    """``x`` in channels_last where that spares oneDNN a copy of every activation into a format of its own, and back."""
    return x.contiguous(memory_format=torch.channels_last) if _is_formatted(x) else x


def match(module: nn.Module) -> Match | None:
    """What takes the place of ``module``, a part of a network that a fused layer calls; None: it stays as it is."""
    kinds = [type(layer) for layer in module] if type(module) is nn.Sequential else []
    fits = kinds.count(nn.Conv2d) > 1 and all(kind in (nn.Conv2d, *_ACTIVATIONS) for kind in kinds)
    return Match(Sequential) if fits else None


def _is_formatted(x: Tensor) -> bool:
    return (x.dim() == 4 and x.device.type == "cpu" and x.dtype != torch.float64
            and x.shape[2] * x.shape[3] >= _FEW_PIXELS)


def _watched(*layers: nn.Module) -> bool:
    return any(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
               for layer in layers)
