"""The likelihood bound of single images, and what is said about its mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Images, dequantize
from .bits_per_dim import bits_per_dim
from .running_mean import RunningMean

__all__ = ["Bounds", "Estimate", "evaluation_indices", "likelihood_bounds"]

_CHOICE_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over images, in bits per dimension, and how sure it is."""

    mean: float
    half_width: float
    """Half of the 95 % confidence interval over the choice of images, what noise is left included; normal
    approximation, which wants about 30 images. NaN for a single image."""
    noise_half_width: float
    """The part of it that is due to noise and that more draws make smaller; NaN for a single draw."""


@dataclass(frozen=True)
class Bounds:
    """The bound on each image's negative log-likelihood for each draw of the noise, float64, on the CPU."""

    total: Tensor
    """Bits per dimension of the image, (K, N) for K draws and N images."""
    levels: dict[str, Tensor]
    """Bits per dimension of each level, (K, N), the lowest level first."""

    def estimates(self) -> tuple[Estimate, dict[str, Estimate]]:
        """Means over draws and images: of the total, and of each level."""
        return _estimate(self.total), {level: _estimate(values) for level, values in self.levels.items()}


def evaluation_indices(available: int, wanted: int) -> Tensor:
    """Which images to evaluate on: all, or a fixed random choice when there are more than ``wanted``; (N,), int64."""
    if available <= wanted:
        return torch.arange(available)
    return torch.randperm(available, generator=torch.Generator().manual_seed(_CHOICE_SEED))[:wanted].sort().values


@torch.no_grad()
def likelihood_bounds(
    model: nn.Module, images: Images | Tensor, indices: Tensor, *, batch_size: int, bits: int = 8, draws: int = 1,
    seed: int = 0, progress: Callable[[int], object] = lambda count: None,
) -> Bounds:
    """The bound on the negative log-likelihood of each image.

    Images are dequantised with uniform noise only: with any other noise it would not bound the likelihood of 8-bit
    images. The noise of each batch comes from the seed, the number of the draw and that of the batch, so that
    differences between models are not the noise's; the global random state is left alone.

    Draws are averaged. The logarithm of their mean likelihood would be a tighter bound only if each draw were one
    sample of one posterior. HFlow's is not: its flows and its decoders see different noise on the same target, and the
    noise's entropy enters in its exact mean.

    Args:
        model: with ``bound``, as :class:`hflow_fast.models.HFlow`, in evaluation mode.
        images: a split of a dataset.
        indices: which of them, (N,), N ≥ 1.
        batch_size: images per pass. HFlow's noise follows the spread of each batch, so the bound depends on it, by some
            hundredths of a bit: compare numbers of equal batch size.
        bits: of the pixel values.
        draws: K ≥ 1, of all noise.
        seed: at least 0.
        progress: told the number of images after each batch, K·N in all.
    """
    device = next(model.parameters()).device
    total: list[Tensor] = []
    levels: dict[str, list[Tensor]] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for draw in range(draws):
            for number, batch in enumerate(indices.split(batch_size)):
                torch.manual_seed(int(np.random.SeedSequence((seed, draw, number)).generate_state(1, np.uint64)[0]))
                bound = model.bound(dequantize(images[batch].to(device), bits=bits))
                total.append(bits_per_dim(bound.nats.double(), model.dims, bits).cpu())
                for level, values in bound.levels.items():
                    levels.setdefault(level, []).append(values.double().cpu())
                progress(len(batch))
    return Bounds(torch.cat(total).view(draws, -1),
                  {level: torch.cat(values).view(draws, -1) for level, values in levels.items()})


def _estimate(values: Tensor) -> Estimate:
    draws, count = values.shape
    images = RunningMean()
    images.update(values.mean(dim=0))
    noise = math.nan
    if draws > 1:
        noise = NormalDist().inv_cdf(0.975) * math.sqrt(float(values.var(dim=0).mean()) / (draws * count))
    return Estimate(images.mean, images.half_width(), noise)
