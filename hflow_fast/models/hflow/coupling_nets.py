"""The networks inside HFlow's couplings: passive half (and the decoder's context) → raw scale and shift.

Each takes x and its own embedding of the context (:class:`ContextEmbeddings`), and returns (B, 2C, …): C channels of scale, then C
of shift, unclipped and unmasked; the coupling clips them and ignores what lies outside its active set. The input is
masked here, times √2 because half of it is zero.

The layers that give them stay float32 in every precision: a rounded shift is an error of the latent itself, many times
larger where the flow has found little noise in the data.
"""

from __future__ import annotations

import math
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import active_mask
from .architecture import StepSpec
from .layers import EqualConv2d, EqualLinear, Together, downsample, instance_norm, keep_fine, upsample

__all__ = ["ContextEmbeddings", "PlainCouplingNet", "PoolingCouplingNet", "VectorCouplingNet"]

_SMALLEST_BINOMIAL = 4  # below 8 pixels, resampling keeps the corners instead (align_corners)


class _CouplingNet(nn.Module):
    """Holds √2 where the coupling leaves its input unchanged and 0 where it transforms it."""

    passive: Tensor

    def __init__(self, channels: int, resolution: int, spec: StepSpec) -> None:
        super().__init__()
        self.spec = spec
        active = active_mask(spec.coupling, (1, channels, resolution, resolution))
        self.register_buffer("passive", (~active).float() * math.sqrt(2.0), persistent=False)


class VectorCouplingNet(nn.Module):
    """For the endblock, one pixel: (B, C, 1, 1), context (B, K) or none → (B, 2C, 1, 1)."""

    passive: Tensor

    def __init__(self, channels: int, hidden: int, context_channels: int | None) -> None:
        super().__init__()
        # √2 where the coupling leaves its input unchanged, as below.
        passive = math.sqrt(2.0) * (torch.arange(channels) < channels // 2)
        self.register_buffer("passive", passive, persistent=False)
        if context_channels is None:
            self.input = EqualLinear(channels, channels, activation="tanh")
        else:
            self.context = EqualLinear(context_channels, context_channels)
            self.input = EqualLinear(channels + context_channels, channels)
        self.hidden = nn.Sequential(EqualLinear(channels, hidden), EqualLinear(hidden, hidden),
                                    EqualLinear(hidden, hidden))
        self.scale = EqualLinear(hidden // 2, channels, activation="linear", zero_init=True)
        self.shift = nn.Sequential(EqualLinear(hidden // 2, hidden // 2),
                                   EqualLinear(hidden // 2, channels, activation="linear"))
        keep_fine(self.scale, self.shift[-1])

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        passive = self.input.entering(x.flatten(1) * self.passive)
        if context is None:
            x = self.input(passive)
        else:
            x = self.input(torch.cat([passive, context], dim=1))
        scale, shift = self.hidden(x).chunk(2, dim=1)
        return torch.cat([self.scale(scale), self.shift(shift)], dim=1)[..., None, None]


class PlainCouplingNet(_CouplingNet):
    """A few convolutions at the level's resolution: (B, C, H, W), context (B, K, H, W) → (B, 2C, H, W)."""

    def __init__(self, channels: int, resolution: int, spec: StepSpec) -> None:
        super().__init__(channels, resolution, spec)
        hidden, kernel, context = spec.hidden_channels, spec.kernel, spec.context_channels
        self.context = EqualConv2d(context, context, 3)
        self.input = EqualConv2d(channels + context, channels, 3, activation="tanh")
        self.hidden = nn.Sequential(EqualConv2d(channels, hidden, kernel), EqualConv2d(hidden, hidden, kernel),
                                    EqualConv2d(hidden, hidden, kernel))
        self.scale = EqualConv2d(hidden // 2, channels, 1, activation="linear", zero_init=True)
        self.shift = nn.Sequential(EqualConv2d(hidden // 2, hidden // 2, 3),
                                   EqualConv2d(hidden // 2, channels, 1, activation="linear"))
        keep_fine(self.scale, self.shift[-1])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.input(torch.cat([self.input.entering(x * self.passive), context], dim=1))
        scale, shift = self.hidden(instance_norm(x)).chunk(2, dim=1)
        return torch.cat([self.scale(scale), self.shift(shift)], dim=1)


class PoolingCouplingNet(_CouplingNet):
    """A small U-net, so that a coarse checkerboard sees beyond its block: shapes as :class:`PlainCouplingNet`."""

    def __init__(self, channels: int, resolution: int, spec: StepSpec) -> None:
        super().__init__(channels, resolution, spec)
        hidden, kernel = spec.hidden_channels, spec.kernel
        widths = [int(hidden * spec.unet_growth**level) for level in range(spec.unet_levels + 1)]
        self.context = EqualConv2d(spec.context_channels, spec.context_channels // 2, 1, activation="tanh")
        self.input = EqualConv2d(channels + spec.context_channels // 2, hidden, 3)
        self.before = nn.Sequential(EqualConv2d(hidden, hidden, kernel), EqualConv2d(hidden, hidden, kernel))
        self.down = nn.ModuleList(_DenseBlock(fine, coarse, coarse, spec.unet_kernel)
                                  for fine, coarse in zip(widths, widths[1:]))
        lowest_is_pixel = resolution >> spec.unet_levels == 1
        self.bottom = EqualConv2d(widths[-1], widths[-1], 1 if lowest_is_pixel else 3)
        self.up = nn.ModuleList(_DenseBlock(coarse, coarse, fine, spec.unet_kernel)
                                for fine, coarse in reversed(list(zip(widths, widths[1:]))))
        self.after = EqualConv2d(hidden, hidden, kernel)
        self.scale, self.shift = (
            nn.Sequential(EqualConv2d(hidden // 2, hidden // 2, 3),
                          EqualConv2d(hidden // 2, channels, 1, activation="linear", zero_init=True))
            for _ in range(2))
        keep_fine(self.scale[-1], self.shift[-1])
        # Half of the channels goes to the scale's layers, the other to the shift's.
        self.together = [Together(layers, own_inputs=True) for layers in zip(self.scale, self.shift)]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.input.entering(x * self.passive)
        if self.spec.flip is not None:
            x = x.flip(self.spec.flip)
        x = self.before(self.input(torch.cat([x, context], dim=1)))
        skips = []
        for block in self.down:
            skips.append(x)
            for _ in range(self.spec.halvings_per_level):
                x = _halve(x)
            x = block(x)
        x = self.bottom(x)
        for block in self.up:
            for _ in range(self.spec.halvings_per_level):
                x = _double(x)
            x = block(x, skips.pop())
        x = self.after(x)
        for layers in self.together:
            x = layers(x)
        return x


class ContextEmbeddings:
    """What each network sees of the context (B, K, H, W): its own layer of it, all of one kind in one convolution.

    A plain network's has a skip connection; a pooling network's has half the channels.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.count = len(networks)
        self.groups: dict[type[nn.Module], tuple[list[int], Together]] = {}
        for kind in dict.fromkeys(map(type, networks)):
            indices = [index for index, network in enumerate(networks)
                       if type(network) is kind and hasattr(network, "context")]
            if indices:
                self.groups[kind] = indices, Together([networks[index].context for index in indices])

    def __call__(self, context: Tensor | None) -> list[Tensor | None]:
        """One embedding per network; None for networks without context."""
        embedded: list[Tensor | None] = [None] * self.count
        for kind, (indices, layers) in self.groups.items():
            given = context.flatten(1) if kind is VectorCouplingNet else context
            parts = layers(given).unflatten(1, (len(indices), -1))
            if kind is not PoolingCouplingNet:
                parts = parts + given[:, None]
            for index, part in zip(indices, parts.unbind(1)):
                embedded[index] = part
        return embedded


class _DenseBlock(nn.Module):
    """Norm, two convolutions, and a 1-step dense connection around them; merged with ``residual`` if there is one."""

    def __init__(self, channels: int, hidden: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.first = EqualConv2d(channels, hidden, kernel)
        self.second = EqualConv2d(hidden, out_channels, kernel)
        self.merge = EqualConv2d(channels + out_channels, out_channels, kernel, activation="linear")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.shape[1] >= 2:
            x = instance_norm(x)
        return self.merge(torch.cat([x, self.second(self.first(x))], dim=1), residual)


def _halve(x: Tensor) -> Tensor:
    if x.shape[-1] > _SMALLEST_BINOMIAL:
        return downsample(x)
    return F.interpolate(x, size=x.shape[-1] // 2, mode="bilinear", align_corners=True)


def _double(x: Tensor) -> Tensor:
    if x.shape[-1] > _SMALLEST_BINOMIAL:
        return upsample(x)
    return F.interpolate(x, size=2 * x.shape[-1], mode="bilinear", align_corners=True)
