"""What a model looks like while it is trained: grids of samples and of reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Images, dequantize
from ..data.classes import class_labels, number_of_classes
from ..inference import draw_samples, image_grid, reconstruct
from .config import TrainConfig

__all__ = ["reconstruction_grid", "sample_grid"]

_COLUMNS = 8
_ROWS = 4
_CLASSES = 10  # at most, of which there is a row of samples each


def sample_grid(model: nn.Module, config: TrainConfig) -> Tensor:
    """Samples at SAMPLE_BASE_SIGMA, always from the same latents; each class of a class-conditional model has a row.

    Returns:
        (3, H, W), uint8.
    """
    count, given = _ROWS * _COLUMNS, {}
    if classes := min(number_of_classes(model), _CLASSES):
        count, given = classes * _COLUMNS, {"labels": torch.arange(classes).repeat_interleave(_COLUMNS)}
    samples = draw_samples(model, count, std=config.output.sample_base_sigma, seed=config.general.seed,
                           bits=config.general.discretization_bits, **given)
    return image_grid(samples, _COLUMNS)


def reconstruction_grid(model: nn.Module, images: Images, indices: Tensor, config: TrainConfig) -> Tensor:
    """A column for each of the first images of ``indices``: itself, and what fewer and fewer of its latents give.

    Returns:
        (3, H, W), uint8.
    """
    shown = indices[:_COLUMNS]
    x = dequantize(images[shown].to(next(model.parameters()).device), bits=config.general.discretization_bits)
    labels = class_labels(model, images)
    return image_grid(reconstruct(model, x, **({} if labels is None else {"labels": labels[shown]})), len(shown))
