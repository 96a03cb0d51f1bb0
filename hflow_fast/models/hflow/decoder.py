"""Decoders: from the target of the level below to what conditions this level's flow."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn

from ...nn.recompute import Recomputable
from .architecture import LevelSpec
from .config import EndblockConfig
from .layers import EqualConv2d, EqualLinear, Together, instance_norm, keep_fine, merge_residual, upsample
from .noise import Noise, perturb
from .unet import ParallelUNets, UNet

__all__ = ["CodeDecoder", "Decoded", "LevelDecoder"]


class Decoded(NamedTuple):
    """What a decoder tells its level's flow; all at the level's resolution."""

    start: Tensor
    """(B, 2C, R, R): raw scale and shift of the affine map that the image side of the flow starts with."""
    end: Tensor
    """(B, 2C, R, R): raw scale and shift of the affine map next to the latent."""
    features: Tensor
    """(B, hidden, R, R): what the coupling networks and the next decoder are conditioned on."""


class CodeDecoder(nn.Module):
    """The code at one pixel → a 4 × 4 canvas: a learned constant, plus the code where ``use_code`` is set."""

    def __init__(self, settings: EndblockConfig) -> None:
        super().__init__()
        self.use_code = not settings.block_y0
        self.canvas = nn.Parameter(torch.randn(1, settings.autoencoder_channels, 4, 4))

    def forward(self, code: Tensor) -> Tensor:
        canvas = self.canvas.expand(code.shape[0], -1, -1, -1)
        return canvas + code if self.use_code else canvas


class LevelDecoder(Recomputable):
    """Target below (B, C', R/ratio, R/ratio), style (B, S) and skip from the decoder below → :class:`Decoded`."""

    def __init__(self, spec: LevelSpec, style_channels: int) -> None:
        super().__init__()
        decoder = spec.decoder
        hidden, style = decoder.hidden_channels, style_channels if decoder.style else None
        self.noise = decoder.noise
        if spec.is_lowest:
            self.refine, in_channels = None, spec.target_channels
        else:
            in_channels = spec.target_channels + decoder.skip_channels
            self.refine = _Refinement(spec, spec.resolution // spec.ratio)
        self.blocks = nn.ModuleList(
            _Doubling(in_channels if index == 0 else hidden, spec, style)
            for index in range(int(math.log2(spec.ratio))))
        # Between two doublings the features are normalised; after the last they go to the heads as they are.
        self.normalize_between = decoder.normalize
        self.start = _AffineHead(spec)
        self.end = _AffineHead(spec)
        self._heads = _AffineHeads([self.start, self.end])
        self.together = self._heads.together

    def perturb(self, target: Tensor, noise: Noise) -> Tensor:
        """The target with the noise that this decoder is trained to be robust to."""
        return perturb(target, self.noise, noise) if self.noise else target

    def forward(self, target: Tensor, style: Tensor | None, skip: Tensor | None) -> Decoded:
        x = self.blocks[0].input.entering(target)
        if self.refine is not None:
            x = self.part(self.refine, self.refine, x, skip)
        for index, block in enumerate(self.blocks):
            if index and self.normalize_between:
                x = instance_norm(x)
            x = self.part(block, block, x, style)
        return Decoded(*self.part(self, self._heads, x), x)


class _Refinement(nn.Module):
    """Blends the (noisy) target with the skip of the decoder below, through a U-net."""

    def __init__(self, spec: LevelSpec, resolution: int) -> None:
        super().__init__()
        decoder, channels = spec.decoder, spec.target_channels
        hidden, lr_scale = decoder.hidden_channels, decoder.lr_scale
        self.unet = UNet(decoder.skip_channels + channels, channels, resolution, growth=2.0,
                         normalize=decoder.normalize)
        self.first = EqualConv2d(channels, hidden, 3, lr_scale=lr_scale)
        self.second = EqualConv2d(hidden, hidden, 3, lr_scale=lr_scale, dead_bias=True)
        self.last = EqualConv2d(hidden, channels, 3, activation="linear", lr_scale=lr_scale, dead_bias=True)

    def forward(self, target: Tensor, skip: Tensor) -> Tensor:
        x = merge_residual(target, self.unet(torch.cat([skip, target], dim=1)))
        x = self.first(x)
        x = self.last(self.second(x, x))
        return torch.cat([skip, x], dim=1)


class _Doubling(nn.Module):
    """Twice the resolution, with residual convolutions before and after, restyled if there is a style."""

    def __init__(self, in_channels: int, spec: LevelSpec, style_channels: int | None) -> None:
        super().__init__()
        decoder = spec.decoder
        hidden, lr_scale = decoder.hidden_channels, decoder.lr_scale
        self.input = EqualConv2d(in_channels, hidden, 3, lr_scale=lr_scale)
        self.normalize = decoder.normalize
        self.residual = nn.ModuleList(EqualConv2d(hidden, hidden, 3, lr_scale=lr_scale) for _ in range(3))
        self.styles = nn.ModuleList()
        if style_channels is not None:
            self.styles.extend(EqualLinear(style_channels, 2 * hidden, activation="linear") for _ in range(2))

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        before, middle, after = self.residual
        x = self.input(x)
        if self.normalize:
            x = instance_norm(x)
        x = upsample(before(x, x))
        x = self._restyle(x, style, 0)
        x = self._restyle(middle(x, x), style, 1)
        return after(x, x)

    def _restyle(self, x: Tensor, style: Tensor | None, index: int) -> Tensor:
        """Adaptive instance norm (Huang & Belongie, ICCV 2017)."""
        if self.styles:
            scale, shift = self.styles[index](style)[..., None, None].chunk(2, dim=1)
            return instance_norm(x) * scale + shift
        return instance_norm(x) if self.normalize else x


class _AffineHead(nn.Module):
    """The layers from features (B, hidden, R, R) to raw (B, 2C, R, R): scale, zero at the start, then shift.

    :class:`_AffineHeads` runs them, two heads at once.
    """

    def __init__(self, spec: LevelSpec) -> None:
        super().__init__()
        decoder, channels = spec.decoder, spec.channels
        hidden, lr_scale = decoder.hidden_channels, decoder.lr_scale
        self.shift = EqualConv2d(hidden, channels, 1, activation="linear", lr_scale=lr_scale)
        self.unet = None
        if decoder.unet_on_shift:
            self.unet = UNet(channels, channels, spec.resolution, normalize=decoder.normalize)
        self.scale = nn.Sequential(
            EqualConv2d(hidden, channels, 3, lr_scale=lr_scale),
            EqualConv2d(channels, channels, 1, activation="linear", lr_scale=lr_scale, zero_init=True))
        keep_fine(self)  # as the last layers of coupling networks


class _AffineHeads:
    """Heads on the same features, each step of all of them in one convolution."""

    def __init__(self, heads: Sequence[_AffineHead]) -> None:
        self.count = len(heads)
        self.shift = Together([head.shift for head in heads])
        self.unet = None if heads[0].unet is None else ParallelUNets([head.unet for head in heads])
        self.scale = [Together([head.scale[0] for head in heads]),
                      Together([head.scale[1] for head in heads], own_inputs=True)]
        self.together = [self.shift, *self.scale, *(self.unet.together if self.unet else ())]

    def __call__(self, x: Tensor) -> list[Tensor]:
        shift = self.shift(x)
        if self.unet is not None:
            shift = merge_residual(self.unet(shift), shift)
        first, second = self.scale
        scale = second(first(x))
        return [torch.cat(pair, dim=1) for pair in zip(scale.chunk(self.count, dim=1), shift.chunk(self.count, dim=1))]
