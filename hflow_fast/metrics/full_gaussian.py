"""The best single Gaussian of images: with full covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..data import Images
from .bits_per_dim import bits_per_dim

__all__ = ["FullGaussian"]

_CHUNK = 1024
_FOLDS = 5
_SHRINKAGES = (0.0, *(scale * 10.0**power for power in (-5, -4, -3, -2, -1) for scale in (1, 3)))


@dataclass(frozen=True)
class FullGaussian:
    """A Gaussian over all values of an image together, dequantised to [-0.5, 0.5].

    Meant for small images: the covariance has (3·R²)² entries.
    """

    mean: Tensor
    """(D,), float64, D = 3·R², in the order of (3, R, R)."""
    covariance: Tensor
    """(D, D), float64, that of the dequantisation noise included."""
    shrinkage: float
    """λ: how far the covariance was drawn towards its diagonal."""
    bits: int

    @classmethod
    def fit(cls, images: Images | Tensor, bits: int = 8, shrinkage: float | None = None) -> FullGaussian:
        r"""Mean and covariance over images and dequantisation noise.

        .. math:: \Sigma = (1 - \lambda)\, S + \lambda\, \mathrm{diag}(S)

        S is the maximum-likelihood covariance; the noise adds 1/12 of a squared bin to its diagonal, so that it is
        never singular.

        Args:
            images: (N, C, H, W), uint8, N ≥ 1.
            bits: of the pixel values, 1 to 8: the low 8 − bits are dropped.
            shrinkage: λ in [0, 1]. None: the one of a fixed list that is best in the mean of five parts of ``images``,
                each judged by the fit to the other four. Parts are contiguous, so that images which follow each other
                and are alike give no wrong impression. Fewer than 10 images take 1, independent pixels.

        Raises:
            ValueError: there are no images, or λ is outside [0, 1].
        """
        if not len(images):
            raise ValueError("FullGaussian.fit: there are no images.")
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ValueError(f"FullGaussian.fit: shrinkage must be in [0, 1], got {shrinkage}.")
        bounds = [len(images) * fold // _FOLDS for fold in range(_FOLDS + 1)]
        ranges = [range(start, stop) for start, stop in zip(bounds, bounds[1:]) if stop > start]
        folds = [_Moments.of(images, part, bits) for part in ranges]
        everything = reduce(add, folds)
        if shrinkage is None:
            shrinkage = _best_shrinkage(folds, everything) if len(images) >= 2 * _FOLDS else 1.0
        return cls(everything.mean, _shrunk(everything.covariance, shrinkage), shrinkage, bits)

    def bits_per_dim(self, images: Images | Tensor) -> Tensor:
        """Bits per dimension of each image, in the exact mean over its dequantisation noise.

        Args:
            images: (N, C, H, W), uint8.

        Returns:
            (N,), float64.
        """
        factor = torch.linalg.cholesky(self.covariance)
        noise = torch.cholesky_inverse(factor).diagonal().sum() / (12 * 4**self.bits)
        constant = 0.5 * (noise + _log_det(factor) + len(self.mean) * math.log(2 * math.pi))
        nats = []
        for start in range(0, len(images), _CHUNK):
            centred = _values(images[start:start + _CHUNK], self.bits) - self.mean
            whitened = torch.linalg.solve_triangular(factor, centred.T, upper=False)
            nats.append(constant + 0.5 * whitened.square().sum(dim=0))
        return bits_per_dim(torch.cat(nats), len(self.mean), self.bits)


@dataclass(frozen=True)
class _Moments:
    """Sums over images, of values near zero."""

    count: int
    total: Tensor
    """(D,), float64."""
    outer: Tensor
    """(D, D), float64."""
    bits: int

    @classmethod
    def of(cls, images: Images | Tensor, which: range, bits: int) -> _Moments:
        parts = []
        for start in range(which.start, which.stop, _CHUNK):
            values = _values(images[start:min(start + _CHUNK, which.stop)], bits)
            parts.append(cls(len(values), values.sum(dim=0), values.T @ values, bits))
        return reduce(add, parts)

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.count + other.count, self.total + other.total, self.outer + other.outer, self.bits)

    def __sub__(self, other: _Moments) -> _Moments:
        return _Moments(self.count - other.count, self.total - other.total, self.outer - other.outer, self.bits)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        return self.spread_about(self.mean)

    def spread_about(self, point: Tensor) -> Tensor:
        """Mean of (x − point)(x − point)ᵀ over images and dequantisation noise, (D, D)."""
        cross = torch.outer(self.mean, point)
        spread = self.outer / self.count - cross - cross.T + torch.outer(point, point)
        return spread + torch.eye(len(point), dtype=torch.float64) / (12 * 4**self.bits)


def _best_shrinkage(folds: list[_Moments], everything: _Moments) -> float:
    costs = dict.fromkeys(_SHRINKAGES, 0.0)
    for fold in folds:
        others = everything - fold
        covariance, spread = others.covariance, fold.spread_about(others.mean)
        for shrinkage in costs:
            factor = torch.linalg.cholesky(_shrunk(covariance, shrinkage))
            distance = torch.cholesky_solve(spread, factor).diagonal().sum()
            costs[shrinkage] += fold.count * float(distance + _log_det(factor))
    return min(costs, key=costs.__getitem__)


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    return (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().diag()


def _log_det(factor: Tensor) -> Tensor:
    """Of the matrix whose Cholesky factor this is."""
    return 2 * factor.diagonal().log().sum()


def _values(images: Tensor, bits: int) -> Tensor:
    """The middles of the quantisation bins, in [-0.5, 0.5]: (N, D), float64."""
    return ((images.flatten(1) >> (8 - bits)).double() + 0.5) / 2**bits - 0.5
