"""What each level is responsible for: the image's spread when one level's latents are drawn anew."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from ..sampling import draw_latents
from .latents import decode_in_batches, encode_in_batches, expand

__all__ = ["randomize_levels"]


@torch.no_grad()
def randomize_levels(
    model: nn.Module, images: Tensor, *, draws: int = 32, std: float | Sequence[float] = 1.0, seed: int = 0,
    batch_size: int = 16, label: int | None = None, progress: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Standard deviation of each pixel when the latents of one level are replaced by fresh samples.

    All other latents stay those of the image. Every level and image sees the same draws.

    Args:
        model: a flow, such as an HFlow or a Glow.
        images: (N, 3, R, R), uint8.
        draws: K ≥ 2.
        std, seed: of the samples, as :func:`hflow_fast.inference.draw_latents` takes them.
        batch_size: images at a time.
        label: for a class-conditional model: the class under which all are encoded and decoded.
        progress: told the number of images after each K decoded ones, L·N·K in all.

    Returns:
        (L, N, R, R) for L levels, finest first; on the CPU, in units of the pixel range; the mean over the colours.
    """
    if draws < 2:
        raise ValueError(f"randomize_levels: a spread needs at least 2 draws, got {draws}.")
    latents = encode_in_batches(model, images, batch_size, label)
    fresh = draw_latents(model, range(draws), std=std, seed=seed)
    maps = torch.empty(len(latents), len(images), *images.shape[-2:])
    for index in range(len(images)):
        kept = expand(latents, index, draws)
        for level in range(len(latents)):
            drawn = decode_in_batches(model, [*kept[:level], fresh[level], *kept[level + 1:]], batch_size, label)
            maps[level, index] = drawn.clamp(-0.5, 0.5).std(dim=0).mean(dim=0)
            progress(draws)
    return maps
