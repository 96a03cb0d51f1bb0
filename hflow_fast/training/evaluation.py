"""The held-out likelihood bound."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

import torch
from torch import nn

from ..data import Images, dequantize
from ..metrics import RunningMean, bits_per_dim
from .distributed import Ranks
from .randomness import Use, seed_generators

__all__ = ["evaluation_indices", "held_out_bits_per_dim"]

_SEED = 0


def evaluation_indices(available: int, wanted: int) -> torch.Tensor:
    """Which held-out images to evaluate on: all, or a fixed random choice when there are more than ``wanted``."""
    if available <= wanted:
        return torch.arange(available)
    return torch.randperm(available, generator=torch.Generator().manual_seed(_SEED))[:wanted].sort().values


@torch.no_grad()
def held_out_bits_per_dim(
    model: nn.Module, images: Images, indices: torch.Tensor, *, batch_size: int, bits: int = 8,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """The bound on the negative log-likelihood of images, in bits per dimension.

    Images are dequantised with uniform noise only: with any other noise it would not bound the likelihood of 8-bit
    images. The noise of a batch depends on nothing but its number, so that differences are the model's; the global
    random state is left changed.

    Args:
        model: with ``bound``, as :class:`hflow_fast.models.HFlow`.
        images: a split of a dataset.
        indices: which of them, (N,), N ≥ 1.
        batch_size: images per pass. HFlow's noise follows the spread of each batch, so the bound depends on it, by some
            hundredths of a bit: compare numbers of equal batch size.
        bits: of the pixel values.
        ranks: the processes that share the batches, each with an equal model; all of them call this and get the value
            that one alone would get. None for this one alone.

    Returns:
        ``held_out_bits_per_dim`` and, for each level of the model, ``held_out_bits_per_dim/<level>``: the means over
        the images.
    """
    device = next(model.parameters()).device
    ranks = ranks or Ranks()
    batches = indices.split(batch_size)
    own: dict[int, dict[str, torch.Tensor]] = {}
    for number in ranks.share(len(batches)):
        seed_generators(device, _SEED, Use.EVALUATION, number)
        bound = model.bound(dequantize(images[batches[number]].to(device), bits=bits))
        own[number] = {"held_out_bits_per_dim": bits_per_dim(bound.nats, model.dims, bits)}
        own[number] |= {f"held_out_bits_per_dim/{level}": value for level, value in bound.levels.items()}
    means: dict[str, RunningMean] = defaultdict(RunningMean)
    everything = chain.from_iterable(part.items() for part in ranks.gather(_to_cpu(own)))
    for _, values in sorted(everything, key=lambda item: item[0]):  # in the order in which one process takes them
        for name, value in values.items():
            means[name].update(value)
    return {name: mean.mean for name, mean in means.items()}


def _to_cpu(batches: dict[int, dict[str, torch.Tensor]]) -> dict[int, dict[str, torch.Tensor]]:
    return {number: {name: value.cpu() for name, value in values.items()} for number, values in batches.items()}
