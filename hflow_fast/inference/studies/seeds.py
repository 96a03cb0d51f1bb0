"""The same seeds at several temperatures."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from ...data import to_uint8
from ..sampling import draw_latents
from .latents import decode_in_batches

__all__ = ["seed_samples"]


@torch.no_grad()
def seed_samples(
    model: nn.Module, seeds: Sequence[int], stds: Sequence[float | Sequence[float]], *, batch_size: int = 16,
    label: int | None = None, bits: int = 8,
) -> Tensor:
    """The first sample of each seed at each std: the same noise, scaled.

    Args:
        model: a flow, such as an HFlow or a Glow.
        seeds: S numbers; the image of a seed is the first one that ``hflow-fast sample --seed`` draws.
        stds: T temperatures, as :func:`hflow_fast.inference.draw_latents` takes them.
        batch_size: images at a time.
        label: for a class-conditional model: the class of all samples.
        bits: of the pixel values, as :func:`hflow_fast.inference.draw_samples` takes them.

    Returns:
        (T, S, 3, R, R), uint8, on the CPU.
    """
    rows = []
    for std in stds:
        parts = [draw_latents(model, [0], std=std, seed=seed) for seed in seeds]
        rows.append(decode_in_batches(model, [torch.cat(levels) for levels in zip(*parts)], batch_size, label))
    return to_uint8(torch.stack(rows)) >> 8 - bits << 8 - bits
