"""The per-channel and 1 × 1 parts of a chain of flow steps, folded for the fused kernel.

From image to latent a step is actnorm → coupling → 1 × 1 convolution, so between two coupling networks stands one
1 × 1 convolution followed by the next step's actnorm: one affine map of the channels, y = W x + b.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._cache import ParameterCache
from ...nn._data_init import DataInitialized, channel_statistics
from ...nn._inversion import invert
from ...nn.skew_exponential import Squarings, skew_exponential
from ...ops import lu_many

__all__ = ["FoldedAffines", "StepAffines", "fold_to_latent"]

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

    folded: FoldedAffines | None = None
    """The maps for x → z, while :class:`~.effective.EffectiveWeights` provides them."""

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
        return _matrices([self])[0][0]

    def follow(self) -> int | None:
        """See :meth:`Squarings.follow`; None for matrices that are no exponentials."""
        return self._squarings.follow()

    def to_latent(self) -> FoldedAffines:
        """The maps for x → z: first actnorm; then each convolution with the actnorm after it; last convolution."""
        return self.folded or self._cache.get("latent", list(self.parameters()), lambda: fold_to_latent([self])[0])

    def to_data(self, dtype: torch.dtype = torch.float32) -> FoldedAffines:
        """The maps for z → x: last inverse convolution; each actnorm with the convolution before it; first actnorm.

        Args:
            dtype: of z: the inverses are rounded to it, or to the parameters' dtype if that is wider.
        """
        return self._cache.get(f"data {dtype}", list(self.parameters()), lambda: self._fold_to_data(dtype))

    def _fold_to_data(self, dtype: torch.dtype) -> FoldedAffines:
        # What is inverted is exactly what the other direction multiplies by, roundings and all.
        weights, biases, log_det = self.to_latent()
        inverses = invert(weights, "StepAffines")
        biases = -(inverses @ biases.double()[:, :, None]).squeeze(-1)
        dtype = torch.promote_types(torch.promote_types(weights.dtype, torch.float32), dtype)
        return FoldedAffines(inverses.flip(0).to(dtype), biases.flip(0).to(dtype), -log_det)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "folded"}


def fold_to_latent(chains: Sequence[StepAffines]) -> list[FoldedAffines]:
    """The maps for x → z of several chains of steps; all their log-dets in one launch."""
    return [_fold(chain, *pair) for chain, pair in zip(chains, _matrices(chains))]


def _fold(chain: StepAffines, matrices: Tensor, log_det: Tensor) -> FoldedAffines:
    scale = torch.exp(-chain.log_scale)
    shift = -chain.bias * scale
    # Rows of [1, M_0, M_1, …] are scaled by the actnorm that follows; after the last matrix there is none.
    weights = torch.cat([_identity(matrices), matrices]) * F.pad(scale, _AFTER, value=1.0)[:, :, None]
    return FoldedAffines(weights, F.pad(shift, _AFTER), log_det - chain.log_scale.sum())


def _matrices(chains: Sequence[StepAffines]) -> list[tuple[Tensor, Tensor]]:
    """The convolutions' matrices (L, C, C) of each chain, and the sum of their log|det| (0-dim)."""
    matrices = [chain.matrix * chain.gain for chain in chains]
    full = [index for index, chain in enumerate(chains) if chain.parametrization == "full"]
    log_dets = dict(zip(full, (log_dets.sum() for log_dets, _ in lu_many([matrices[index] for index in full]))))
    for index, chain in enumerate(chains):
        if chain.parametrization == "orthogonal":
            matrices[index] = skew_exponential(matrices[index], chain._squarings)
            log_dets[index] = matrices[index].new_zeros(())
    return [(matrix, log_dets[index]) for index, matrix in enumerate(matrices)]


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None]
