"""Likelihood bounds of single images, and what they say about their mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from .running_mean import RunningMean

__all__ = ["Bounds", "Estimate", "evaluation_indices"]

_CHOICE_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over images, in bits per dimension, and how sure it is."""

    mean: float
    half_width: float
    """Half of the 95 % confidence interval over the choice of images, the noise that is left included; by the normal
    approximation, which wants about 30 images. NaN for a single one."""
    noise_half_width: float
    """The part of it that is due to noise, which more draws make smaller; NaN for a single draw."""

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From the values of K draws for N images, (K, N)."""
        draws, count = values.shape
        images = RunningMean()
        images.update(values.mean(dim=0))
        noise = math.nan
        if draws > 1:
            noise = NormalDist().inv_cdf(0.975) * math.sqrt(float(values.var(dim=0).mean()) / (draws * count))
        return cls(images.mean, images.half_width(), noise)


@dataclass(frozen=True)
class Bounds:
    """The bound on each image's negative log-likelihood for each draw of the noise, float64, on the CPU."""

    total: Tensor
    """Bits per dimension of the image, (K, N) for K draws and N images."""
    levels: dict[str, Tensor]
    """Bits per dimension of each level's own values, (K, N), the lowest level first."""

    def estimates(self) -> tuple[Estimate, dict[str, Estimate]]:
        """The means over images and draws: of the total, and of each level."""
        return Estimate.of(self.total), {level: Estimate.of(values) for level, values in self.levels.items()}


def evaluation_indices(available: int, wanted: int) -> Tensor:
    """Which images to evaluate on: all, or a fixed random choice when there are more than ``wanted``; (N,), int64."""
    if available <= wanted:
        return torch.arange(available)
    return torch.randperm(available, generator=torch.Generator().manual_seed(_CHOICE_SEED))[:wanted].sort().values
