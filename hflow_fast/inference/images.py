"""Pictures on disk: grids and PNG files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._files import replacing

__all__ = ["enlarge", "image_grid", "read_png", "safe_name", "safe_stem", "save_png"]

_SMALLEST_TILE = 96  # pixels; small images are hard to look at on a screen


def enlarge(images: Tensor, width: int) -> Tensor:
    """Images (…, H, W) enlarged by whole pixels towards a width: (…, k·H, k·W), k = max(1, ⌊width/W⌋)."""
    factor = max(1, width // images.shape[-1])
    return images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def image_grid(images: Tensor, columns: int, *, padding: int = 2) -> Tensor:
    """Images side by side on white; small ones enlarged by whole pixels, towards 96.

    Args:
        images: (N, 3, H, W), uint8; filled in row by row.
        columns: images per row.
        padding: pixels between and around them.

    Returns:
        (3, rows·(k·H + padding) + padding, columns·(k·W + padding) + padding), uint8, k = max(1, ⌊96/W⌋).
    """
    images = enlarge(images, _SMALLEST_TILE)
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


def read_png(path: str | os.PathLike[str]) -> Tensor:
    """What :func:`save_png` wrote, (3, H, W), uint8.

    Raises:
        OSError: it is missing or damaged.
    """
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def safe_name(text: str) -> str:
    """Text of anyone's as part of a file's name."""
    return re.sub(r"[^\w.-]", "_", text)[:100]


def safe_stem(name: str) -> str:
    """A file's name without folders and suffix, as part of a new one."""
    return safe_name(Path(name).stem)
