"""Labelled pictures of the studies."""

from __future__ import annotations

import math
import os
from typing import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..._files import replacing
from ...errors import ConfigError
from ..images import image_grid

__all__ = ["labelled_grid", "save_heat_maps"]

_FONT_SIZE = 13
_GAP = 6  # pixels between a label and its images


def labelled_grid(
    images: Tensor, *, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> Tensor:
    """A grid of images, as :func:`hflow_fast.inference.image_grid` makes it, with labels beside rows and columns.

    Args:
        images: (rows, columns, 3, H, W), uint8.
        rows, columns: a text for each; a line break starts a second line.

    Returns:
        (3, H', W'), uint8.
    """
    padding = 2
    grid = image_grid(images.flatten(0, 1), images.shape[1], padding=padding)
    height, width = ((size - padding) // count for size, count in zip(grid.shape[1:], images.shape[:2]))
    font = ImageFont.load_default(_FONT_SIZE)
    left = max((_text_size(text, font)[0] + _GAP for text in rows or ()), default=0)
    top = max((_text_size(text, font)[1] + _GAP for text in columns or ()), default=0)
    page = Image.new("RGB", (left + grid.shape[2], top + grid.shape[1]), "white")
    page.paste(Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (left, top))
    draw = ImageDraw.Draw(page)
    for index, text in enumerate(rows or ()):
        draw.multiline_text((left - _GAP // 2, top + padding / 2 + (index + 0.5) * height), text, "black", font,
                            anchor="rm", align="right")
    for index, text in enumerate(columns or ()):
        draw.multiline_text((left + padding / 2 + (index + 0.5) * width, top - _GAP // 2), text, "black", font,
                            anchor="md", align="center")
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def _text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height in pixels."""
    _, _, width, height = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font)
    return math.ceil(width), math.ceil(height)


def save_heat_maps(
    images: Tensor, maps: Tensor, names: Sequence[str], path: str | os.PathLike[str], *, label: str
) -> None:
    """Heat maps beside their images, all on one colour scale, as a PNG file.

    Args:
        images: (N, 3, R, R), uint8.
        maps: (L, N, R, R), at least 0.
        names: of the L columns.
        path: the file.
        label: of the colour scale.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("heat maps need the package matplotlib: pip install 'hflow_fast[train]'.") from error
    count, columns = len(images), len(maps) + 1
    figure = Figure(figsize=(1.4 * columns + 1, 1.4 * count + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, columns, squeeze=False)
    largest = float(maps.max())
    for row in range(count):
        axes[row, 0].imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
        for column in range(1, columns):
            shown = axes[row, column].imshow(maps[column - 1, row].numpy(), vmin=0, vmax=largest, cmap="viridis",
                                             interpolation="nearest")
    for axis, name in zip(axes[0], ["image", *names]):
        axis.set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes, label=label, aspect=12 * count)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
