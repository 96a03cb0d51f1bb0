"""A smooth walk through latent space that ends where it began."""

from __future__ import annotations

import math
from typing import Iterator, Sequence

import torch
from torch import Tensor, nn

from ...data import to_uint8
from ..sampling import draw_latents
from .latents import decode_in_batches

__all__ = ["random_walk", "walk_latents"]


def random_walk(
    model: nn.Module, *, frames: int, count: int = 1, std: float | Sequence[float] = 0.8, seed: int = 0,
    turns: int = 3, steps: float | Sequence[float] = 1.0, batch_size: int = 16, label: int | None = None,
) -> Iterator[Tensor]:
    """The frames of a film of samples that wander and come back, one at a time: (count, 3, R, R), uint8, on the CPU.

    Arguments as :func:`walk_latents` takes them; and the class of all samples, for a class-conditional model.
    """
    for latents in walk_latents(model, frames=frames, count=count, std=std, seed=seed, turns=turns, steps=steps):
        yield to_uint8(decode_in_batches(model, latents, batch_size, label))


def walk_latents(
    model: nn.Module, *, frames: int, count: int = 1, std: float | Sequence[float] = 0.8, seed: int = 0,
    turns: int = 3, steps: float | Sequence[float] = 1.0,
) -> Iterator[list[Tensor]]:
    r"""The latents of each frame of a closed random walk.

    Every latent value follows a periodic Gaussian process,

    .. math:: z(t) = \sqrt{1 - s^2}\, c + \frac{s}{\sqrt K} \sum_{k=1}^K a_k \cos 2\pi k t + b_k \sin 2\pi k t,

    with independent samples :math:`a_k, b_k, c` of the prior. So at every time it is a sample of the prior, which
    straight lines between samples are not, and it has no corners.

    Args:
        model: a flow, such as an HFlow or a Glow.
        frames: F; frame f is at :math:`t = f / F`, so that the first follows the last.
        count: walks at a time.
        std, seed: of the samples, as :func:`hflow_fast.inference.draw_latents` takes them.
        turns: K, how much happens on the way: the speed grows like it.
        steps: s in [0, 1], how much of each latent moves, 0 for one that stays; one number, or one per level, finest
            first.

    Yields:
        One tensor (count, C, H, W) for each of ``model.latent_shapes``, F times.
    """
    levels = len(model.latent_shapes)
    moving = list(steps) if isinstance(steps, Sequence) else [steps] * levels
    if len(moving) != levels or not all(0 <= step <= 1 for step in moving):
        raise ValueError(f"random_walk: steps must be one number or {levels} (one per level, finest first), all from 0 "
                         f"to 1; got {steps}.")
    if turns < 1:
        raise ValueError(f"random_walk: turns must be at least 1, got {turns}.")

    drawn = [draw_latents(model, range(start, start + count), std=std, seed=seed)
             for start in range(0, (2 * turns + 1) * count, count)]
    # For each level: what stays, then the 2·K amplitudes.
    amplitudes = [torch.stack(parts) for parts in zip(*drawn)]
    for frame in range(frames):
        angles = 2 * math.pi * frame / frames * torch.arange(1, turns + 1, dtype=torch.float64)
        waves = torch.cat([angles.cos(), angles.sin()]) / math.sqrt(turns)
        yield [math.sqrt(1 - step**2) * parts[0] + step * torch.tensordot(waves.to(parts), parts[1:], dims=1)
               for step, parts in zip(moving, amplitudes)]
