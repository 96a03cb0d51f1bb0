"""Layers that move pixels into channels: squeeze and the Haar transform."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import compute_dtype
from ..ops import haar

__all__ = ["Haar", "Squeeze", "squeezed", "unsqueezed"]


def squeezed(x: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) → (B, C·f², H/f, W/f), channel c·f² + dy·f + dx."""
    if x.numel():
        return F.pixel_unshuffle(x, factor)
    batch, channels, height, width = x.shape  # of which torch gives an empty tensor another shape
    return x.reshape(batch, channels * factor**2, height // factor, width // factor)


def unsqueezed(x: Tensor, factor: int) -> Tensor:
    """The inverse of :func:`squeezed`."""
    if x.numel():
        return F.pixel_shuffle(x, factor)
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels // factor**2, height * factor, width * factor)


class Squeeze(nn.Module):
    """(B, C, H, W) → (B, C·f², H/f, W/f), Glow's order: channel c·f² + dy·f + dx. Log-det 0.

    Args:
        factor: f.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,). ``context`` is ignored.

        Raises:
            ValueError: H or W is not a multiple of the factor.
        """
        if x.dim() != 4 or x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"Squeeze: x has shape {tuple(x.shape)}; it must be (B, C, H, W) with H and W multiples of "
                             f"{self.factor}.")
        return squeezed(x, self.factor), x.new_zeros(x.shape[0], dtype=compute_dtype(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,). ``context`` is ignored."""
        return unsqueezed(z, self.factor), z.new_zeros(z.shape[0], dtype=compute_dtype(z))

    def extra_repr(self) -> str:
        return str(self.factor)


class Haar(nn.Module):
    """The Haar wavelet transform, :func:`hflow_fast.ops.haar`, as a layer; arguments as there."""

    def __init__(self, levels: int = 1, order: str = "colour", rebalance: float = 1.0) -> None:
        super().__init__()
        self.options = dict(levels=levels, order=order, rebalance=rebalance)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,). ``context`` is ignored."""
        return haar(x, **self.options)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,). ``context`` is ignored."""
        return haar(z, **self.options, inverse=True)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
