"""normflows' checkerboards: every second element, over channels, rows and columns, squeezed in the last dimension."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

__all__ = ["merge", "split"]


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The elements whose indices (without the batch's) have an odd sum, and the others: (B, …, W) → (B, …, W/2) each.

    Raises:
        ValueError: W is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"AffineCouplingBlock: a checkerboard needs an even last dimension, got x of shape "
                         f"{tuple(x.shape)}.")
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    odd_row = _odd_rows(x.shape, x.device)
    return torch.where(odd_row, even, odd), torch.where(odd_row, odd, even)


def merge(first: Tensor, second: Tensor) -> Tensor:
    """Undoes :func:`split`."""
    odd_row = _odd_rows(first.shape, first.device)
    return torch.stack([torch.where(odd_row, first, second), torch.where(odd_row, second, first)], dim=-1).flatten(-2)


def _odd_rows(shape: Sequence[int], device: torch.device) -> Tensor:
    """Where the indices but for the first and the last have an odd sum; one more dimension, of size 1, at the end."""
    odd = torch.zeros((), dtype=torch.bool, device=device)
    for size in shape[1:-1]:
        odd = odd.unsqueeze(-1) ^ (torch.arange(size, device=device) % 2 == 1)
    return odd.unsqueeze(-1)
