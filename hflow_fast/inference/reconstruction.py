"""What is left of images when some of their latents are replaced."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from ..data import to_uint8
from .labels import Labels, label_tensors

__all__ = ["reconstruct"]


@torch.no_grad()
def reconstruct(model: nn.Module, x: Tensor, labels: Labels = None) -> Tensor:
    """The images and what is left of them when latents are replaced by zero, their prior's mean.

    Args:
        model: a flow, such as an HFlow or a Glow.
        x: (N, 3, R, R) in [-0.5, 0.5].
        labels: for a class-conditional model: one class for all images, or one for each.

    Returns:
        ((L + 1)·N, 3, R, R), uint8, on the CPU, for L latents: the images, then their reconstructions from all
        latents, from all but the finest, and so on down to the coarsest alone.
    """
    classes = label_tensors(model, labels, len(x))
    latents, _ = model.encode(x, *classes)
    rows: Sequence[Tensor] = [x] + [
        model.decode([torch.zeros_like(z) for z in latents[:dropped]] + latents[dropped:], *classes)[0]
        for dropped in range(len(latents))
    ]
    return torch.cat([to_uint8(row).cpu() for row in rows])
