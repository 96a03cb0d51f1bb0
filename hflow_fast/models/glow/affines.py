"""Actnorm and permutation of a level's steps, folded for the fused kernel.

Between two coupling networks stands one affine map of the channels, z = W x + b: the next step's actnorm, then its
permutation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...nn._data_init import channel_statistics
from ...nn._inversion import invert
from ...ops import lu
from .folding import Folding
from .network import LOGS_FACTOR

__all__ = ["StepAffines"]

Permutation = Literal["reverse", "shuffle", "1x1", "1x1_lu"]


class StepAffines(Folding):
    """Actnorm z = (x + bias)·e^(3·logs) and permutation of K steps on C channels, numbered from image to latent.

    Kingma & Dhariwal, "Glow", NeurIPS 2018, §3.1 and §3.2. Learned permutations start as random rotations; "1x1_lu" is
    W = P L (U + diag(±e^s)) with fixed P and signs (Eq. 10), multiplied in float64.
    """

    def __init__(self, steps: int, channels: int, permutation: Permutation) -> None:
        super().__init__()
        self.permutation = permutation
        self.bias = nn.Parameter(torch.zeros(steps, channels))
        self.logs = nn.Parameter(torch.zeros(steps, channels))
        if permutation == "reverse":
            self.register_buffer("order", torch.arange(channels - 1, -1, -1).repeat(steps, 1))
        elif permutation == "shuffle":
            self.register_buffer("order", torch.rand(steps, channels).argsort(dim=1))
        else:
            rotation = torch.linalg.qr(torch.randn(steps, channels, channels))[0]
            if permutation == "1x1":
                self.weight = nn.Parameter(rotation)
            else:
                self._decompose(rotation)

    def _decompose(self, rotation: Tensor) -> None:
        order, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal(dim1=1, dim2=2)
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.register_buffer("sign", diagonal.sign())
        self.register_buffer("order", order.argmax(dim=2))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The permutations' matrices (K, C, C) and their log|det| (K,)."""
        if self.permutation == "1x1":
            return self.weight, lu(self.weight)[0]
        if self.permutation == "1x1_lu":
            lower, upper = self.lower.double().tril(-1), self.upper.double().triu(1)
            identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
            diagonal = torch.diag_embed(self.sign.double() * self.log_diagonal.double().exp())
            product = (lower + identity) @ (upper + diagonal)
            matrices = product.take_along_dim(self.order[:, :, None], dim=1)
            return matrices.to(self.lower.dtype), self.log_diagonal.sum(dim=1)
        identity = torch.eye(self.order.shape[1], dtype=self.bias.dtype, device=self.bias.device)
        return identity[self.order], self.bias.new_zeros(self.bias.shape[0])

    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """The maps from x to z: matrices (K, C, C), biases (K, C) and log|det| per pixel (K,)."""
        matrices, log_dets = self.matrices()
        log_scales = LOGS_FACTOR * self.logs
        weights = matrices * torch.exp(log_scales)[:, None, :]
        # Not a matrix product, which autocast and tf32 would round.
        biases = (weights * self.bias[:, None, :]).sum(dim=2)
        return weights, biases, log_dets + log_scales.sum(dim=1)

    def to_data(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The maps from z to x, as :meth:`fold` returns those from x to z.

        Args:
            dtype: of z: the inverses are rounded to it, or to the parameters' dtype if that is wider.
        """
        return self._cache.get(f"data {dtype}", list(self.parameters()), lambda: self._invert(dtype))

    def _invert(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        # What is inverted is exactly what the other direction multiplies by, roundings and all.
        weights, biases, log_dets = self.folded()
        inverses = invert(weights, "Glow")
        biases = -(inverses @ biases.double()[:, :, None]).squeeze(-1)
        dtype = torch.promote_types(torch.promote_types(weights.dtype, torch.float32), dtype)
        return inverses.to(dtype), biases.to(dtype), -log_dets

    @torch.no_grad()
    def initialize_one(self, index: int, x: Tensor) -> None:
        """Sets actnorm ``index`` so that it maps ``x`` (B, C, R, R) to zero mean and unit std per channel."""
        mean, log_std = channel_statistics(x, correction=0)
        self.bias[index], self.logs[index] = -mean, -log_std / LOGS_FACTOR
