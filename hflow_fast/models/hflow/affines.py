"""The per-channel and 1 × 1 parts of a chain of flow steps, folded for the fused kernel.

From image to latent a step is actnorm → coupling → 1 × 1 convolution, so between two coupling networks stands one
1 × 1 convolution followed by the next step's actnorm: one affine map of the channels, y = W x + b.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._cache import ParameterCache
from ...nn._data_init import DataInitialized, channel_statistics
from ...nn._inversion import invert
from ...nn.skew_exponential import Squarings, skew_exponential
from ...ops import lu

__all__ = ["FoldedAffines", "StepAffines"]

_AFTER = (0, 0, 0, 1)  # F.pad: one more step behind the others


class FoldedAffines(NamedTuple):
    """L + 1 affine maps of the channels, in the order of evaluation, around L couplings."""

    weights: Tensor
    """(L + 1, C, C)."""
    biases: Tensor
    """(L + 1, C)."""
    log_det: Tensor
    """Sum of their log|det| per pixel, in the direction evaluated; 0-dim."""


class StepAffines(DataInitialized):
    """Actnorm and invertible 1 × 1 convolution of L steps on C channels, numbered from image to latent.

    Actnorm (x → z) is (x − bias)·e^(−log_scale); the convolution's matrix is ``gain``·K ("full") or
    exp(``gain``·(K − Kᵀ)) ("orthogonal", log-det 0). Both come from Kingma & Dhariwal, "Glow", NeurIPS 2018, §3.

    Args:
        gain: relative learning rate of the matrices: they are stored divided by it.
        data_init: whether :meth:`initialize_step` applies; otherwise actnorms start as the identity.
    """

    def __init__(self, steps: int, channels: int, parametrization: Literal["full", "orthogonal"], gain: float,
                 data_init: bool) -> None:
        super().__init__(data_init)
        self.parametrization = parametrization
        self.gain = gain
        self.log_scale = nn.Parameter(torch.zeros(steps, channels))
        self.bias = nn.Parameter(torch.zeros(steps, channels))
        matrix = torch.randn(steps, channels, channels)
        self.matrix = nn.Parameter((torch.linalg.qr(matrix)[0] if parametrization == "full" else matrix) / gain)
        self._cache = ParameterCache()
        self._squarings = Squarings()

    @torch.no_grad()
    def initialize_step(self, step: int, x: Tensor) -> None:
        """Sets actnorm ``step`` so that it maps ``x`` (B, C, H, W) to zero mean and unit unbiased std per channel."""
        self.bias[step], self.log_scale[step] = channel_statistics(x)

    def matrices(self) -> Tensor:
        """The convolutions' matrices, x → z, (L, C, C)."""
        return self._matrices()[0]

    def to_latent(self) -> FoldedAffines:
        """The maps for x → z: first actnorm; then each convolution with the actnorm after it; last convolution."""
        return self._cache.get("latent", list(self.parameters()), self._fold_to_latent)

    def to_data(self) -> FoldedAffines:
        """The maps for z → x: last inverse convolution; each actnorm with the convolution before it; first actnorm."""
        return self._cache.get("data", list(self.parameters()), self._fold_to_data)

    def _fold_to_latent(self) -> FoldedAffines:
        matrices, log_det = self._matrices()
        scale = torch.exp(-self.log_scale)
        shift = -self.bias * scale
        # Rows of [1, M_0, M_1, …] are scaled by the actnorm that follows; after the last matrix there is none.
        weights = torch.cat([_identity(matrices), matrices]) * F.pad(scale, _AFTER, value=1.0)[:, :, None]
        return FoldedAffines(weights, F.pad(shift, _AFTER), log_det - self.log_scale.sum())

    def _fold_to_data(self) -> FoldedAffines:
        # What is inverted is exactly what the other direction multiplies by, roundings and all.
        weights, biases, log_det = self.to_latent()
        inverses = invert(weights, "StepAffines")
        biases = -(inverses @ biases.double()[:, :, None]).squeeze(-1)
        dtype = torch.promote_types(weights.dtype, torch.float32)
        return FoldedAffines(inverses.flip(0).to(dtype), biases.flip(0).to(dtype), -log_det)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """The convolutions' matrices (L, C, C), and the sum of log|det| (0-dim)."""
        if self.parametrization == "orthogonal":
            matrices = skew_exponential(self.matrix * self.gain, self._squarings)
            return matrices, matrices.new_zeros(())
        matrices = self.matrix * self.gain
        return matrices, lu(matrices)[0].sum()


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None]
