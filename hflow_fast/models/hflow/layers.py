"""Layers of HFlow's networks: equalised learning rate, instance norm, binomial resampling.

Shapes are (B, C, H, W) unless said otherwise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EqualConv2d", "EqualLinear", "downsample", "instance_norm", "merge_residual", "upsample"]

Activation = Literal["leaky_relu", "tanh", "linear"]

LEAKY_SLOPE = 0.1
NORM_EPSILON = 1e-6
_LEAKY_GAIN = math.sqrt(2.0 / (1.0 + LEAKY_SLOPE**2))
_GAIN = {"leaky_relu": _LEAKY_GAIN, "tanh": 5.0 / 3.0, "linear": 1.0}


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(x, LEAKY_SLOPE)
    return torch.tanh(x) if activation == "tanh" else x


class _Equalized(nn.Module):
    """Parameters stored as N(0, 1)/lr_scale and multiplied at run time by He's gain and ``lr_scale``.

    So every weight moves at the same relative rate under Adam, ``lr_scale`` times faster where asked
    (Karras et al., "Progressive Growing of GANs", ICLR 2018, §4.1).
    """

    def __init__(self, shape: tuple[int, ...], gain: float, activation: Activation, lr_scale: float,
                 zero_init: bool) -> None:
        super().__init__()
        self.activation = activation
        self.weight_scale = lr_scale * gain / math.sqrt(math.prod(shape[1:]))
        self.bias_scale = lr_scale
        weight = torch.zeros(shape) if zero_init else torch.randn(shape) / lr_scale
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(shape[0]))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.activation}"


class EqualConv2d(_Equalized):
    """Same-size convolution with equalised learning rate, then an activation: (B, in, H, W) → (B, out, H, W).

    Args:
        lr_scale: relative learning rate of weight and bias.
        zero_init: start from zero weights, so that the layer's output is zero.
        dead_bias: the bias has no effect. It stays a parameter because the original has it: parameter counts,
            optimizer states and checkpoints correspond.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, activation: Activation = "leaky_relu",
                 lr_scale: float = 1.0, zero_init: bool = False, dead_bias: bool = False) -> None:
        shape = (out_channels, in_channels, kernel, kernel)
        super().__init__(shape, _GAIN[activation], activation, lr_scale, zero_init)
        if dead_bias:
            self.bias_scale = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight * self.weight_scale, self.bias * self.bias_scale,
                     padding=self.weight.shape[-1] // 2)
        return _activate(x, self.activation)


class EqualLinear(_Equalized):
    """Linear map with equalised learning rate, then an activation: (B, in) → (B, out)."""

    def __init__(self, in_features: int, out_features: int, *, activation: Activation = "leaky_relu",
                 lr_scale: float = 1.0, zero_init: bool = False) -> None:
        gain = 1.0 if activation == "linear" else _LEAKY_GAIN  # the original's tanh uses leaky ReLU's gain here
        super().__init__((out_features, in_features), gain, activation, lr_scale, zero_init)

    def forward(self, x: Tensor) -> Tensor:
        return _activate(F.linear(x, self.weight * self.weight_scale, self.bias * self.bias_scale), self.activation)


def instance_norm(x: Tensor) -> Tensor:
    """Zero mean and unit **unbiased** variance over the pixels of each channel; over the channels of a single pixel.

    (x − mean)/√(var + 1e-6). Written with the library's biased norm: for n values, unbiased and biased variance
    differ by n/(n − 1), which moves into epsilon and a factor outside.
    """
    single_pixel = x.shape[-1] == 1
    count = x.shape[1] if single_pixel else x.shape[-1] * x.shape[-2]
    ratio = (count - 1) / count
    if single_pixel:
        normed = F.layer_norm(x, x.shape[1:], eps=NORM_EPSILON * ratio)
    else:
        normed = F.instance_norm(x, eps=NORM_EPSILON * ratio)
    return normed * math.sqrt(ratio)


def merge_residual(x: Tensor, y: Tensor) -> Tensor:
    """(x + y)/√2: the sum of two unit-variance tensors, at unit variance."""
    return (x + y) * math.sqrt(0.5)


def downsample(x: Tensor) -> Tensor:
    """Half size by the binomial filter [1, 3, 3, 1]/8 in each direction, edges reflected. H, W even and ≥ 2."""
    taps = torch.tensor([0.125, 0.375, 0.375, 0.125], dtype=x.dtype, device=x.device)
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def upsample(x: Tensor) -> Tensor:
    """Double size by the binomial filter [1, 3, 3, 1]/4 in each direction. H, W ≥ 2.

    Away from the edges this is bilinear interpolation; the original's zero-stuffing and padding repeat the first
    row and column but reflect the last, which one reflected row and column before interpolation reproduces.
    """
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, 1, 0, 1), mode="reflect")
    return F.interpolate(padded, scale_factor=2.0, mode="bilinear")[..., : 2 * height, : 2 * width]
