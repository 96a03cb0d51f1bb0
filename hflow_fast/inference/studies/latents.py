"""What the studies share: the latents of images, level by level, and images of latents."""

from __future__ import annotations

from typing import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..interpolation import latents_of
from ..labels import label_tensors

__all__ = ["decode_in_batches", "encode_in_batches", "expand", "level_names"]


def level_names(model: nn.Module) -> list[str]:
    """A name for each latent, in the order of ``model.latent_shapes``: its resolution, or "code" for a single pixel."""
    return ["code" if height == width == 1 else str(height) for _, height, width in model.latent_shapes]


def encode_in_batches(model: nn.Module, images: Tensor, batch_size: int, label: int | None = None) -> list[Tensor]:
    """The latents of images (N, 3, R, R), uint8, finest first, on the model's device."""
    parts = [latents_of(model, batch, label) for batch in images.split(batch_size)]
    return [torch.cat(levels) for levels in zip(*parts)]


@torch.no_grad()
def decode_in_batches(
    model: nn.Module, latents: Sequence[Tensor], batch_size: int, label: int | None = None
) -> Tensor:
    """The images (N, 3, R, R) of latents, on the CPU; in about [-0.5, 0.5], not clipped."""
    batches: Iterable[Sequence[Tensor]] = zip(*(latent.split(batch_size) for latent in latents))
    return torch.cat([model.decode(batch, *label_tensors(model, label, len(batch[0])))[0].cpu() for batch in batches])


def expand(latents: Sequence[Tensor], index: int, count: int) -> list[Tensor]:
    """The latents of one image, ``count`` times; views, to be replaced and not written to."""
    return [latent[index].expand(count, *latent.shape[1:]) for latent in latents]
