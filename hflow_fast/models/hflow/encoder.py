"""The encoder pyramid: from the image, level by level, to the targets that the flows model.

Encoders are fine in all precisions: with encoders in bfloat16, too, training learned measurably slower, which the other
networks do not bring about (docs/performance.md). They are a tenth of the work.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.recompute import Recomputable
from ..precision import widen
from .architecture import LevelSpec
from .config import EndblockConfig
from .layers import EqualConv2d, downsample, instance_norm, keep_fine

__all__ = ["CodeEncoder", "LevelEncoder"]


class _Halving(nn.Module):
    """Convolve, halve, normalise: (B, in, R, R) → (B, hidden, R/2, R/2)."""

    def __init__(self, in_channels: int, hidden: int, kernel: int, lr_scale: float, binomial: bool) -> None:
        super().__init__()
        self.binomial = binomial
        self.first = EqualConv2d(in_channels, hidden, kernel, lr_scale=lr_scale)
        self.second = EqualConv2d(hidden, hidden, kernel, lr_scale=lr_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = downsample(x) if self.binomial else F.avg_pool2d(x, 2)
        return _norm_unless_pixel(self.second(_norm_unless_pixel(x)))


class LevelEncoder(Recomputable):
    """One level of the pyramid: features (B, in, R, R) → (target, features) of the level below.

    The target is (B, C, R/ratio, R/ratio), normalised per channel; below the lowest level there is none (the code of
    :class:`CodeEncoder` takes its place).
    """

    def __init__(self, spec: LevelSpec) -> None:
        super().__init__()
        hidden, lr_scale = spec.encoder_channels, spec.encoder_lr_scale

        def halving(in_channels: int) -> _Halving:
            return _Halving(in_channels, hidden, spec.encoder_kernel, lr_scale, binomial=not spec.is_lowest)

        def pointwise(out_channels: int) -> EqualConv2d:
            return EqualConv2d(hidden, out_channels, 1, activation="linear", lr_scale=lr_scale)

        self.halvings = nn.ModuleList([halving(spec.encoder_in_channels)])
        self.between = nn.ModuleList()
        if spec.ratio == 4:
            self.between.append(pointwise(hidden))
            self.halvings.append(halving(hidden))
        self.target = None if spec.is_lowest else pointwise(spec.target_channels)
        self.features = pointwise(hidden)
        keep_fine(self)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        x = self.part(self.halvings[0], self.halvings[0], x)
        for between, halving in zip(self.between, self.halvings[1:]):
            x = self.part(halving, halving, instance_norm(between(x)))
        target = None if self.target is None else instance_norm(widen(self.target(x)))
        return target, self.features(x)


class CodeEncoder(nn.Module):
    """The bottom of the pyramid: features (B, in, 4, 4) → code (B, code channels, 1, 1)."""

    def __init__(self, in_channels: int, settings: EndblockConfig, lr_scale: float) -> None:
        super().__init__()
        width = settings.autoencoder_channels
        self.to_2x2 = _Halving(in_channels, width, 3, lr_scale, binomial=False)
        self.between = EqualConv2d(width, width, 1, activation="linear", lr_scale=lr_scale)
        self.to_1x1 = _Halving(width, width, 1, lr_scale, binomial=False)
        self.code = EqualConv2d(width, width, 1, activation="linear", lr_scale=lr_scale)
        keep_fine(self)

    def forward(self, x: Tensor) -> Tensor:
        x = instance_norm(self.between(self.to_2x2(x)))
        return widen(self.code(self.to_1x1(x)))


def _norm_unless_pixel(x: Tensor) -> Tensor:
    return instance_norm(x) if x.shape[-1] > 1 else x
