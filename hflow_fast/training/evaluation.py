"""The held-out likelihood bound."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from ..data import Images, dequantize
from ..metrics import RunningMean, bits_per_dim

__all__ = ["evaluation_indices", "held_out_bits_per_dim"]

_SEED = 0


def evaluation_indices(available: int, wanted: int) -> torch.Tensor:
    """Which held-out images to evaluate on: all, or a fixed random choice when there are more than ``wanted``."""
    if available <= wanted:
        return torch.arange(available)
    return torch.randperm(available, generator=torch.Generator().manual_seed(_SEED))[:wanted].sort().values


@torch.no_grad()
def held_out_bits_per_dim(
    model: nn.Module, images: Images, indices: torch.Tensor, *, batch_size: int, bits: int = 8
) -> dict[str, float]:
    """The bound on the negative log-likelihood of images, in bits per dimension.

    Images are dequantised with uniform noise only: with any other noise it would not bound the likelihood of 8-bit
    images. All noise starts from the same seed at every call, so that differences are the model's; the global random
    state is left changed.

    Args:
        model: with ``bound``, as :class:`hflow_fast.models.HFlow`.
        images: a split of a dataset.
        indices: which of them, (N,), N ≥ 1.
        batch_size: images per pass. HFlow's noise follows the spread of each batch, so the bound depends on it, by some
            hundredths of a bit: compare numbers of equal batch size.
        bits: of the pixel values.

    Returns:
        ``held_out_bits_per_dim`` and, for each level of the model, ``held_out_bits_per_dim/<level>``: the means over
        the images.
    """
    device = next(model.parameters()).device
    torch.manual_seed(_SEED)
    means: dict[str, RunningMean] = defaultdict(RunningMean)
    for batch in indices.split(batch_size):
        x = dequantize(images[batch].to(device), bits=bits)
        bound = model.bound(x)
        values = {"held_out_bits_per_dim": bits_per_dim(bound.nats, model.dims, bits)}
        values |= {f"held_out_bits_per_dim/{level}": value for level, value in bound.levels.items()}
        for name, value in values.items():
            means[name].update(value)
    return {name: mean.mean for name, mean in means.items()}
