"""The held-out likelihood bound."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from ..data import Images, dequantize
from ..data.classes import class_labels
from ..metrics import Bounds, bits_per_dim, evaluation_indices
from .distributed import Ranks
from .randomness import Use, seed_generators

__all__ = ["evaluation_indices", "held_out_bits_per_dim", "likelihood_bounds"]

_TOTAL = ""  # beside the names of levels


@torch.no_grad()
def likelihood_bounds(
    model: nn.Module, images: Images | Tensor, indices: Tensor, *, batch_size: int, bits: int = 8, draws: int = 1,
    seed: int = 0, ranks: Ranks | None = None, progress: Callable[[int], object] = lambda count: None,
) -> Bounds:
    """The bound on the negative log-likelihood of each image, in bits per dimension.

    Images are dequantised with uniform noise only: with any other noise it would not bound the likelihood of 8-bit
    images. The noise of a batch depends on nothing but the seed, the draw's number and the batch's, so that differences
    are the model's; the global random state is left changed.

    Draws are to be averaged. The logarithm of their mean likelihood would be a tighter bound only if each draw were one
    sample of one posterior. HFlow's is not: its flows and its decoders do not see the same noise on a target, and the
    noise's entropy enters in its exact mean.

    Args:
        model: with ``bound``, as :class:`hflow_fast.models.HFlow`, in evaluation mode.
        images: a split of a dataset; for a class-conditional model, of one with classes.
        indices: which of them, (N,), N ≥ 1; see :func:`hflow_fast.metrics.evaluation_indices`.
        batch_size: images per pass. HFlow's noise follows the spread of each batch, so the bound depends on it, by some
            hundredths of a bit, and that of single images by a tenth: compare numbers of equal batch size.
        bits: of the pixel values.
        draws: K ≥ 1, of all noise.
        seed: of the noise, at least 0.
        ranks: the processes that share the batches, each with an equal model; all of them call this and get the values
            that one alone would get. None for this one alone.
        progress: told the number of images after each batch that this process has done.

    Raises:
        DatasetError: the model is class-conditional, and the images have no classes or others.
    """
    device = next(model.parameters()).device
    ranks = ranks or Ranks()
    labels = class_labels(model, images)
    batches = indices.split(batch_size)
    own: dict[int, dict[str, Tensor]] = {}
    for number in ranks.share(draws * len(batches)):
        draw, batch = divmod(number, len(batches))
        seed_generators(device, seed, Use.EVALUATION, draw, batch)
        x = dequantize(images[batches[batch]].to(device), bits=bits)
        bound = model.bound(x) if labels is None else model.bound(x, labels=labels[batches[batch]].to(device))
        values = {_TOTAL: bits_per_dim(bound.nats.double(), model.dims, bits), **bound.levels}
        own[number] = {name: value.double().cpu() for name, value in values.items()}
        progress(len(batches[batch]))
    done = {number: values for part in ranks.gather(own) for number, values in part.items()}
    levels = {name: torch.cat([done[number][name] for number in range(len(done))]).view(draws, -1) for name in done[0]}
    return Bounds(levels.pop(_TOTAL), levels)


def held_out_bits_per_dim(
    model: nn.Module, images: Images, indices: Tensor, *, batch_size: int, bits: int = 8, ranks: Ranks | None = None
) -> dict[str, float]:
    """The means of :func:`likelihood_bounds` over the images, with the same noise at every call; arguments as there.

    Returns:
        ``held_out_bits_per_dim`` and, for each level of the model, ``held_out_bits_per_dim/<level>``.
    """
    bounds = likelihood_bounds(model, images, indices, batch_size=batch_size, bits=bits, ranks=ranks)
    means = {"held_out_bits_per_dim": float(bounds.total.mean())}
    return means | {f"held_out_bits_per_dim/{level}": float(values.mean()) for level, values in bounds.levels.items()}
