"""The held-out likelihood bound, as training reports it."""

from __future__ import annotations

import torch
from torch import nn

from ..data import Images
from ..metrics import evaluation_indices, likelihood_bounds

__all__ = ["evaluation_indices", "held_out_bits_per_dim"]


def held_out_bits_per_dim(
    model: nn.Module, images: Images, indices: torch.Tensor, *, batch_size: int, bits: int = 8
) -> dict[str, float]:
    """The mean of :func:`hflow_fast.metrics.likelihood_bounds` over images, with the same noise at every call.

    Returns:
        ``held_out_bits_per_dim`` and, for each level of the model, ``held_out_bits_per_dim/<level>``.
    """
    bounds = likelihood_bounds(model, images, indices, batch_size=batch_size, bits=bits)
    means = {"held_out_bits_per_dim": float(bounds.total.mean())}
    return means | {f"held_out_bits_per_dim/{level}": float(values.mean()) for level, values in bounds.levels.items()}
