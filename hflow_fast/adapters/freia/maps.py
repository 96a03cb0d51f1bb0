"""FrEIA's layers that are one matrix or one scale per channel, to be folded into their neighbours."""

from __future__ import annotations

import math
from functools import partial
from typing import Sequence

import torch
from FrEIA import modules as stock
from torch import Tensor, nn

from ..._checks import compute_dtype
from ...nn._fusion import ChannelMap, Opaque, Piece
from ...ops import actnorm, conv1x1
from ...ops.flow_step import MAX_FUSED_CHANNELS
from .._chain import permutation
from .base import Evaluated, FusedLayer, permute

__all__ = ["ActNorm", "Fixed1x1Conv", "FixedLinearTransform", "PermuteRandom"]


class ActNorm(FusedLayer, stock.ActNorm):
    """y = x·e^scale + bias, in one pass."""

    @staticmethod
    def unfit(layer: nn.Module) -> str:
        return ("not initialised yet: it takes its values from the next batch, so pass one through the model first"
                if layer.init_on_next_batch else "")

    def forward(self, x: Sequence[Tensor], rev: bool = False, jac: bool = True) -> tuple[list[Tensor], Tensor]:
        y, log_det = self._normalize(x[0], rev)
        return [y], log_det

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        alone = partial(self._normalize, inverse=inverse)
        if self.init_on_next_batch or self.scale.numel() > MAX_FUSED_CHANNELS:
            return [Opaque(alone)]
        log_scale = -self.scale.flatten() if inverse else self.scale.flatten()
        scale, bias = torch.exp(log_scale), self.bias.flatten()
        return [ChannelMap(scale, -bias * scale if inverse else bias, log_scale.sum(), alone)]

    def _normalize(self, x: Tensor, inverse: bool) -> Evaluated:
        if self.init_on_next_batch:
            self._initialize_with_data(x)
        return actnorm(x, self.scale.flatten(), self.bias.flatten(), inverse=inverse)


class Fixed1x1Conv(FusedLayer, stock.Fixed1x1Conv):
    """A fixed matrix of channels, without the setting up of a convolution."""

    log_det_per_sample = False

    def forward(self, x: Sequence[Tensor], rev: bool = False, jac: bool = True) -> tuple[tuple[Tensor], Tensor]:
        weight, log_det = self._matrix(rev)
        return (conv1x1(x[0], weight),), log_det * math.prod(x[0].shape[2:])

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        weight, log_det = self._matrix(inverse)
        return [ChannelMap(weight, None, log_det)]

    def _matrix(self, inverse: bool) -> tuple[Tensor, Tensor]:
        return (self.M_inv if inverse else self.M).flatten(1), -self.logDetM if inverse else self.logDetM


class FixedLinearTransform(FusedLayer, stock.FixedLinearTransform):
    """y = x M + b of vectors, to be folded into its neighbours; alone, the stock layer is one product already."""

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        weight = (self.M_inv if inverse else self.M).mT
        bias = None if isinstance(self.b, float) else self.b.flatten()
        if inverse and bias is not None:
            bias = -(weight @ bias)
        return [ChannelMap(weight, bias, -self.logDetM if inverse else self.logDetM)]


class PermuteRandom(FusedLayer, stock.PermuteRandom):
    """A fixed order of channels, whose gradient is gathered."""

    log_det_per_sample = False

    def forward(self, x: Sequence[Tensor], rev: bool = False, jac: bool = True) -> tuple[list[Tensor], float]:
        return [permute(x[0], *self._orders(rev))], 0.0

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        if self.in_channels > MAX_FUSED_CHANNELS:
            return [Opaque(partial(self._permute, inverse=inverse))]
        identity = permutation(tuple(range(self.in_channels)), compute_dtype(like), like.device)
        weight = identity.weight.index_select(0, self._orders(inverse)[0])
        return [identity._replace(weight=weight, alone=partial(self._permute, inverse=inverse))]

    def _permute(self, x: Tensor, inverse: bool) -> Evaluated:
        return permute(x, *self._orders(inverse)), x.new_zeros(x.shape[0])

    def _orders(self, inverse: bool) -> tuple[Tensor, Tensor]:
        return (self.perm_inv, self.perm) if inverse else (self.perm, self.perm_inv)
