"""The noise that HFlow adds to targets, and its entropy.

A target y is modelled as y + σ·ε, ε ~ N(0, 1); the entropy of the noise enters the bound. σ follows from how much the
targets of a batch vary: the one place where the images of a batch meet. A pass over several groups of images keeps
them apart, so that it is the same as a pass over each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

_SMALLEST_STD = 1e-6

__all__ = ["Noise", "add_noise", "batch_std", "gaussian_entropy", "perturb"]


@dataclass(frozen=True)
class Noise:
    """Where the noise of a pass comes from, and which of its images share statistics.

    Args:
        generators: one for each group of images, None being PyTorch's own. The groups are of one size and follow one
            another in the batch.
        sample: False makes every sample zero; entropies stay.

    Example:
        >>> from hflow_fast.models import HFlow
        >>> model, x = HFlow.from_config("tiny-16"), torch.rand(4, 3, 16, 16) - 0.5
        >>> model.initialize(x)
        >>> seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        >>> both = model.loss(x, Noise(seeds))
        >>> first = model.loss(x[:2], Noise([torch.Generator().manual_seed(1)]))
        >>> torch.allclose(both[:2], first, rtol=1e-4)
        True
    """

    generators: Sequence[torch.Generator | None] = (None,)
    sample: bool = True

    @property
    def groups(self) -> int:
        """How many groups of images."""
        return len(self.generators)

    def like(self, x: Tensor) -> Tensor:
        """N(0, 1), of the shape of ``x`` (B, …)."""
        if self.generators == (None,):
            return torch.randn_like(x)
        return torch.cat([torch.empty_like(part).normal_(generator=generator)
                          for part, generator in zip(x.chunk(self.groups), self.generators)])

    def check(self, images: int) -> None:
        """Whether ``images`` images make whole groups.

        Raises:
            ValueError: they do not.
        """
        if not self.groups or images % self.groups:
            raise ValueError(f"HFlow: {images} images cannot be split into {self.groups} groups of one size; give "
                             "Noise as many generators as there are groups.")


def batch_std(x: Tensor, groups: int = 1) -> Tensor:
    """How much ``x`` (B, …) varies over each group of images: the mean over positions of the unbiased std. (groups,).

    One image has no spread over a group (the original returns NaN); then the spread over its own positions stands in.
    Targets are normalised per channel, so the two are of one size. A group of identical images has no spread either;
    a floor keeps the entropy finite.
    """
    flat = x.unflatten(0, (groups, -1)).flatten(2)
    if flat.shape[1] == 1:
        flat = flat.reshape(groups, -1, 1)
    return torch.std(flat, dim=1).mean(dim=1).clamp_min(_SMALLEST_STD)


def gaussian_entropy(std: Tensor, dims: int) -> Tensor:
    """Differential entropy of N(0, std²) in ``dims`` dimensions, in nats, for each ``std``."""
    return dims * (torch.log(std) + 0.5 * math.log(2.0 * math.pi) + 0.5)


def add_noise(target: Tensor, relative_std: float, noise: Noise) -> tuple[Tensor, Tensor]:
    """The noisy target, cut from the graph, and the noise's entropy in nats (B,).

    Args:
        target: (B, …).
        relative_std: σ as a fraction of :func:`batch_std`.
    """
    target = target.detach()
    std = batch_std(target, noise.groups) * relative_std
    entropy = _per_image(gaussian_entropy(std, math.prod(target.shape[1:])), target).flatten()
    return (target + noise.like(target) * _per_image(std, target) if noise.sample else target), entropy


def perturb(target: Tensor, relative_std: float, noise: Noise) -> Tensor:
    """The target (B, …) with noise that what comes after it learns to be robust to."""
    return target + noise.like(target) * _per_image(batch_std(target, noise.groups) * relative_std, target)


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """One value per group → one per image of ``x`` (B, …), as (B, 1, …)."""
    values = values[:, None].expand(-1, x.shape[0] // len(values))
    return values.reshape(x.shape[0], *[1] * (x.dim() - 1))
