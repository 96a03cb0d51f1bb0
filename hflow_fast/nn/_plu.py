"""Matrices as P L (U + diag(±e^s)): Kingma & Dhariwal, "Glow", NeurIPS 2018, Eq. 10."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compose", "decompose"]


def decompose(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``matrices`` (…, C, C) as what :func:`compose` takes, and as the order of rows (…, C) that P gives the product:
    row i of the matrix is row ``order[i]`` of it."""
    permutation, lower, upper = torch.linalg.lu(matrices)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    return lower.tril(-1), upper.triu(1), diagonal.sign(), diagonal.abs().log(), permutation.argmax(dim=-1)


def compose(lower: Tensor, upper: Tensor, sign: Tensor, log_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """L (U + diag(±e^s)) (…, C, C), in the precision it is given, and log|det| (…).

    Args:
        lower, upper: (…, C, C), of which the strict triangles count; L has ones on its diagonal.
        sign, log_diagonal: (…, C): ± and s.
    """
    lower = lower.tril(-1) + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    upper = upper.triu(1) + torch.diag_embed(sign * log_diagonal.exp())
    with torch.autocast(lower.device.type, enabled=False):
        return lower @ upper, log_diagonal.sum(-1)
