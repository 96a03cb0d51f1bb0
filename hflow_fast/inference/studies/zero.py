"""What is left of images when more and more levels are silenced."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...data import to_uint8
from .latents import decode_in_batches, encode_in_batches

__all__ = ["zero_levels"]


@torch.no_grad()
def zero_levels(
    model: nn.Module, images: Tensor, *, start: Literal["finest", "coarsest"] = "finest", batch_size: int = 16,
    label: int | None = None,
) -> Tensor:
    """Images whose latents are set to zero, their prior's mean, one level after the other.

    Args:
        model: a flow, such as an HFlow or a Glow.
        images: (N, 3, R, R), uint8.
        start: at which end of the hierarchy.
        batch_size: images at a time.
        label: for a class-conditional model: the class under which all are encoded and decoded.

    Returns:
        (L + 1, N, 3, R, R), uint8, on the CPU, for L levels: from all latents; without the first level's; and so on to
        the image of zero latents, which is the same for all.
    """
    latents = encode_in_batches(model, images, batch_size, label)
    order = range(len(latents)) if start == "finest" else reversed(range(len(latents)))
    steps = [decode_in_batches(model, latents, batch_size, label)]
    for level in order:
        latents[level] = torch.zeros_like(latents[level])
        steps.append(decode_in_batches(model, latents, batch_size, label))
    return to_uint8(torch.stack(steps))
