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
from ...nn.skew_exponential import skew_exponential
from ...ops import lu

__all__ = ["FoldedAffines", "StepAffines"]

_BEFORE, _AFTER = (0, 0, 1, 0), (0, 0, 0, 1)  # F.pad: one more step, ahead of the others or behind them


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
        matrices, _, log_det = self._matrices()
        scale = torch.exp(-self.log_scale)
        shift = -self.bias * scale
        # Rows of [1, M_0, M_1, …] are scaled by the actnorm that follows; after the last matrix there is none.
        weights = torch.cat([_identity(matrices), matrices]) * F.pad(scale, _AFTER, value=1.0)[:, :, None]
        return FoldedAffines(weights, F.pad(shift, _AFTER), log_det - self.log_scale.sum())

    def _fold_to_data(self) -> FoldedAffines:
        _, inverses, log_det = self._matrices()
        inverses, log_scale, bias = inverses.flip(0), self.log_scale.flip(0), self.bias.flip(0)
        # Columns of […, M_1⁻¹, M_0⁻¹, 1] are scaled by the actnorm inverted before it; before the first there is none.
        inverses = torch.cat([inverses, _identity(inverses)])
        biases = torch.einsum("lij,lj->li", inverses, F.pad(bias, _BEFORE))
        return FoldedAffines(inverses * F.pad(log_scale.exp(), _BEFORE, value=1.0)[:, None, :], biases,
                             log_scale.sum() - log_det)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """The convolutions' matrices (L, C, C), their inverses, and the sum of log|det| (0-dim)."""
        if self.parametrization == "orthogonal":
            matrices = skew_exponential(self.matrix * self.gain)
            return matrices, matrices.mT, matrices.new_zeros(())
        matrices = self.matrix * self.gain
        log_abs_det, inverses = lu(matrices)
        return matrices, inverses, log_abs_det.sum()


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None]
