"""Images and latents on their way into a model: what all models check, and how they draw samples' latents."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

__all__ = ["check_images", "check_latents", "random_latents"]


def check_images(model: nn.Module, x: Tensor) -> None:
    """Whether ``x`` has the shape (B, 3, R, R) of the model's images.

    Raises:
        ValueError: it has not.
    """
    size = model.resolution
    if x.dim() != 4 or tuple(x.shape[1:]) != (3, size, size):
        raise ValueError(f"{type(model).__name__}: x has shape {tuple(x.shape)}; this model takes (B, 3, {size}, "
                         f"{size}). Resize the images or choose another configuration.")


def check_latents(model: nn.Module, latents: Sequence[Tensor]) -> None:
    """Whether there are all of the model's latents, of its shapes.

    Raises:
        ValueError: there are not.
    """
    shapes = [tuple(latent.shape[1:]) for latent in latents]
    if shapes != model.latent_shapes:
        raise ValueError(f"{type(model).__name__}.decode: latents have shapes {shapes} after the batch; this model's are "
                         f"{model.latent_shapes}, finest level first.")


def random_latents(
    model: nn.Module, n: int, std: float | Sequence[float], generator: torch.Generator | None
) -> list[Tensor]:
    """Normal latents of ``n`` images, each of its :meth:`latent_stds`, where the model's parameters are."""
    like = next(model.parameters())
    return [torch.randn(n, *shape, generator=generator, device=like.device, dtype=like.dtype) * scale
            for shape, scale in zip(model.latent_shapes, model.latent_stds(std))]
