"""FrEIA's layers that move pixels into channels, each in one pass and without a convolution."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Sequence

from FrEIA import modules as stock
from torch import Tensor, nn

from ...nn._fusion import Opaque, Piece
from ...nn.reshape import squeezed, unsqueezed
from ...ops import haar
from .base import Evaluated, FusedLayer

__all__ = ["HaarDownsampling", "HaarUpsampling", "IRevNetDownsampling", "IRevNetUpsampling"]


class _Haar(FusedLayer):
    """:func:`hflow_fast.ops.haar`. Unlike the stock layer it leaves its input as it is when reversed."""

    log_det_per_sample = False
    up = False
    """Whether FrEIA's forward direction is the inverse transform."""

    @staticmethod
    def unfit(layer: nn.Module) -> str:
        return "" if layer.fac_fwd > 0 else f"has rebalance {2 * layer.fac_fwd:g}; above 0 there is a kernel"

    def forward(self, x: Sequence[Tensor], c: Any = None, jac: bool = True,
                rev: bool = False) -> tuple[tuple[Tensor], float]:
        inverse = rev != self.up
        log_det = math.prod(x[0].shape[1:]) * (self.jac_rev if inverse else self.jac_fwd)
        return (self._transform(x[0], inverse)[0],), log_det

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        return [Opaque(partial(self._transform, inverse=inverse != self.up))]

    def _transform(self, x: Tensor, inverse: bool) -> Evaluated:
        return haar(x, inverse=inverse, order="wavelet" if self.permute else "colour", rebalance=2 * self.fac_fwd)


class HaarDownsampling(_Haar, stock.HaarDownsampling):
    """(B, C, H, W) → (B, 4C, H/2, W/2), wavelet bands."""


class HaarUpsampling(_Haar, stock.HaarUpsampling):
    """(B, 4C, H, W) → (B, C, 2H, 2W), the inverse of :class:`HaarDownsampling`."""

    up = True


class _IRevNet(FusedLayer):
    """The four pixels of a square as four channels: numbered 4·channel + pixel, or by the ``legacy_backend`` channel +
    C·pixel."""

    log_det_per_sample = False
    up = False
    """Whether FrEIA's forward direction makes the image larger."""

    def forward(self, x: Sequence[Tensor], c: Any = None, jac: bool = True,
                rev: bool = False) -> tuple[tuple[Tensor], float]:
        return (self._reshape(x[0], rev != self.up),), 0.0

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        up = inverse != self.up
        return [Opaque(lambda x: (self._reshape(x, up), x.new_zeros(x.shape[0])))]

    def _reshape(self, x: Tensor, up: bool) -> Tensor:
        if not self.legacy_backend:
            return unsqueezed(x, 2) if up else squeezed(x, 2)
        if up:  # (B, dy, dx, C, H, W) → (B, C, H, dy, W, dx)
            return x.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
        squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return squares.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


class IRevNetDownsampling(_IRevNet, stock.IRevNetDownsampling):
    """(B, C, H, W) → (B, 4C, H/2, W/2)."""


class IRevNetUpsampling(_IRevNet, stock.IRevNetUpsampling):
    """(B, 4C, H, W) → (B, C, 2H, 2W)."""

    up = True
