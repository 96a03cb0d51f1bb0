"""Pictures of a model: samples and reconstructions as PNG grids."""

from __future__ import annotations

import os
from typing import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from .._files import replacing
from ..data import to_uint8

__all__ = ["draw_samples", "image_grid", "reconstruct", "save_png"]

_SMALLEST_TILE = 96  # pixels; small images are hard to look at on a screen


def image_grid(images: Tensor, columns: int, *, padding: int = 2) -> Tensor:
    """Images side by side on white; small ones enlarged by whole pixels, towards 96.

    Args:
        images: (N, 3, H, W), uint8; filled in row by row.
        columns: images per row.
        padding: pixels between and around them.

    Returns:
        (3, rows·(k·H + padding) + padding, columns·(k·W + padding) + padding), uint8, k = max(1, ⌊96/W⌋).
    """
    enlargement = max(1, _SMALLEST_TILE // images.shape[-1])
    images = images.repeat_interleave(enlargement, dim=-1).repeat_interleave(enlargement, dim=-2)
    count, _, height, width = images.shape
    rows = -(-count // columns)
    grid = images.new_full((3, rows * (height + padding) + padding, columns * (width + padding) + padding), 255)
    for index, image in enumerate(images):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        grid[:, top:top + height, left:left + width] = image
    return grid


def save_png(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Writes an image (3, H, W), uint8, as a PNG file: whole, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    with replacing(path) as temporary:
        picture.save(temporary, format="png")


@torch.no_grad()
def draw_samples(model: nn.Module, count: int, *, std: float, seed: int, batch_size: int = 16) -> Tensor:
    """Samples of the model, (count, 3, R, R), uint8, on the CPU.

    The same arguments give the same images on the same device and leave the global random state alone.
    """
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    return torch.cat([to_uint8(model.sample(size, std=std, generator=generator)).cpu() for size in sizes])


@torch.no_grad()
def reconstruct(model: nn.Module, x: Tensor) -> Tensor:
    """The images and what is left of them when latents are replaced by zero, their prior's mean.

    Args:
        model: a hierarchical model.
        x: (N, 3, R, R) in [-0.5, 0.5].

    Returns:
        ((L + 1)·N, 3, R, R), uint8, on the CPU, for L latents: the images, then their reconstructions from all
        latents, from all but the finest, and so on down to the coarsest alone.
    """
    latents, _ = model.encode(x)
    rows: Sequence[Tensor] = [x] + [
        model.decode([torch.zeros_like(z) for z in latents[:dropped]] + latents[dropped:])[0]
        for dropped in range(len(latents))
    ]
    return torch.cat([to_uint8(row).cpu() for row in rows])
