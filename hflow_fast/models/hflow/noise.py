"""The noise that HFlow adds to targets, and its entropy.

A target y is modelled as y + σ·ε, ε ~ N(0, 1); the entropy of the noise enters the bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALLEST_STD = 1e-6

__all__ = ["add_noise", "batch_std", "gaussian_entropy"]


def batch_std(x: Tensor) -> Tensor:
    """How much ``x`` (B, …) varies over the batch: the mean over positions of the unbiased std. A 0-dim tensor.

    One image has no spread over a batch (the original returns NaN); then the spread over its own positions stands in.
    Targets are normalised per channel, so the two are of one size. A batch of identical images has no spread either;
    a floor keeps the entropy finite.
    """
    flat = x.flatten(1)
    if flat.shape[0] == 1:
        flat = flat.reshape(-1, 1)
    return torch.std(flat, dim=0).mean().clamp_min(_SMALLEST_STD)


def gaussian_entropy(std: Tensor, dims: int) -> Tensor:
    """Differential entropy of N(0, std²) in ``dims`` dimensions, in nats. A 0-dim tensor."""
    return dims * (torch.log(std) + 0.5 * math.log(2.0 * math.pi) + 0.5)


def add_noise(target: Tensor, relative_std: float, sample: bool) -> tuple[Tensor, Tensor]:
    """The noisy target, cut from the graph, and the noise's entropy in nats.

    Args:
        target: (B, …).
        relative_std: σ as a fraction of :func:`batch_std`.
        sample: False leaves the sample out and keeps the entropy.
    """
    target = target.detach()
    std = batch_std(target) * relative_std
    entropy = gaussian_entropy(std, math.prod(target.shape[1:]))
    return (target + torch.randn_like(target) * std if sample else target), entropy
