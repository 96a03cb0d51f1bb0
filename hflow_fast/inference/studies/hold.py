"""What levels have in common with the image: some latents held fixed, the others drawn anew."""

from __future__ import annotations

from typing import Literal, Sequence

import torch
from torch import Tensor, nn

from ...data import to_uint8
from ...errors import ConfigError
from ..sampling import draw_latents
from .latents import decode_in_batches, encode_in_batches, expand

__all__ = ["hold_levels"]


@torch.no_grad()
def hold_levels(
    model: nn.Module, images: Tensor, *, keep: Literal["coarse", "fine"] = "coarse", draws: int = 6,
    std: float | Sequence[float] = 1.0, seed: int = 0, batch_size: int = 16,
    label: int | None = None,
) -> Tensor:
    """Images that share the latents on one side of the hierarchy and are samples on the other.

    The hierarchy of L levels is cut at each of its L − 1 joints; every cut and image sees the same draws.

    Args:
        model: a flow, such as an HFlow or a Glow.
        images: (N, 3, R, R), uint8.
        keep: "coarse" holds the latents below the cut and varies the finer ones, "fine" the converse.
        draws: K, samples for each cut.
        std, seed: of the samples, as :func:`hflow_fast.inference.draw_latents` takes them.
        batch_size: images at a time.
        label: for a class-conditional model: the class under which all are encoded and decoded.

    Returns:
        (N, L − 1, K, 3, R, R), uint8, on the CPU. Cut c is below the c + 1 finest levels.

    Raises:
        ConfigError: the model has a single level.
    """
    if len(model.latent_shapes) < 2:
        raise ConfigError("hold_levels: this model has a single level, which nothing can be held of.")
    latents = encode_in_batches(model, images, batch_size, label)
    fresh = draw_latents(model, range(draws), std=std, seed=seed)
    samples = torch.empty(len(images), len(latents) - 1, draws, *images.shape[1:], dtype=torch.uint8)
    for index in range(len(images)):
        held = expand(latents, index, draws)
        for cut in range(1, len(latents)):
            mixed = [*fresh[:cut], *held[cut:]] if keep == "coarse" else [*held[:cut], *fresh[cut:]]
            samples[index, cut - 1] = to_uint8(decode_in_batches(model, mixed, batch_size, label))
    return samples
