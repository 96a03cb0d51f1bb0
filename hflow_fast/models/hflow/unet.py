"""The U-net inside HFlow's decoders."""

from __future__ import annotations

import math
from typing import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import EqualConv2d, Together, downsample, instance_norm, upsample

__all__ = ["ParallelUNets", "UNet"]

_SMALLEST_BINOMIAL = 8  # at 8 pixels and below, resampling is a plain 2 × 2 average and bilinear


class UNet(nn.Module):
    """(B, in, R, R) → (B, out, R, R), down to 4 × 4 but at most four halvings.

    Args:
        growth: factor on the width per halving.
        normalize: instance norm before each block.
    """

    def __init__(self, in_channels: int, out_channels: int, resolution: int, *, growth: float = 1.5,
                 normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        widths = [int(in_channels * growth**level) for level in range(_depth(resolution) + 1)]
        steps = list(zip(widths, widths[1:]))
        self.start = EqualConv2d(in_channels, in_channels, 3)
        self.down = nn.ModuleList(_pair(fine, coarse) for fine, coarse in steps)
        self.bottom = EqualConv2d(widths[-1], widths[-1], 1)
        self.up = nn.ModuleList(_pair(coarse, fine) for fine, coarse in reversed(steps))
        self.end = nn.Sequential(EqualConv2d(in_channels, in_channels, 3),
                                 EqualConv2d(in_channels, out_channels, 3, activation="linear"))

    def forward(self, x: Tensor) -> Tensor:
        return _run(self, x)


class ParallelUNets:
    """U-nets of one shape, each on its own channels of one tensor: half the launches for the two of a decoder's heads.

    (B, N·in, R, R) → (B, N·out, R, R). Norms and resampling go by channel, so nothing else mixes the two.
    """

    def __init__(self, nets: Sequence[UNet]) -> None:
        def beside(layers: Iterable[EqualConv2d]) -> Together:
            return Together(list(layers), own_inputs=True)

        def pairs(blocks: Iterable[nn.ModuleList]) -> list[tuple[Together, ...]]:
            return [tuple(beside(layers) for layers in zip(*block)) for block in zip(*blocks)]

        self.normalize = nets[0].normalize
        self.start = beside(net.start for net in nets)
        self.down = pairs(net.down for net in nets)
        self.bottom = beside(net.bottom for net in nets)
        self.up = pairs(net.up for net in nets)
        self.end = [beside(layers) for layers in zip(*(net.end for net in nets))]
        self.together = [self.start, *(layer for pair in (*self.down, *self.up) for layer in pair), self.bottom, *self.end]

    def __call__(self, x: Tensor) -> Tensor:
        return _run(self, x)


def _run(net: UNet | ParallelUNets, x: Tensor) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        return instance_norm(x) if net.normalize else x

    x = net.start(x)
    skips = []
    for first, second in net.down:
        skips.append(x)
        x = _halve(second(first(norm(x))))
    x = net.bottom(x)
    for first, second in net.up:
        x = second(first(norm(_double(x))), skips.pop())
    first, second = net.end
    return second(first(x))


def _depth(resolution: int) -> int:
    """Halvings: down to 4 × 4, between one and four."""
    return max(min(4, int(math.log2(resolution)) - 2), 1)


def _pair(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(EqualConv2d(in_channels, out_channels, 3), EqualConv2d(out_channels, out_channels, 3))


def _halve(x: Tensor) -> Tensor:
    return downsample(x) if x.shape[-1] > _SMALLEST_BINOMIAL else F.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return upsample(x) if x.shape[-1] > _SMALLEST_BINOMIAL else F.interpolate(x, scale_factor=2.0, mode="bilinear")
