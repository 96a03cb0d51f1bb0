"""A mean that knows how sure it is."""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

__all__ = ["RunningMean"]


class RunningMean:
    """Mean and confidence interval of values that come in batches.

    Accumulates in float64 with the pairwise update of Chan, Golub and LeVeque, 1983.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = math.nan
        self._squares = 0.0

    def update(self, values: Tensor) -> None:
        """Adds values of any shape."""
        if not values.numel():
            return
        values = values.detach().double()
        added, mean = values.numel(), float(values.mean())
        squares = float((values - mean).square().sum())
        if self.count:
            shift = mean - self.mean
            squares += self._squares + shift * shift * self.count * added / (self.count + added)
            mean = self.mean + shift * added / (self.count + added)
        self.count, self.mean, self._squares = self.count + added, mean, squares

    @property
    def std(self) -> float:
        """Sample standard deviation (divided by count − 1); NaN below two values."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else math.nan

    def half_width(self, confidence: float = 0.95) -> float:
        """Half of the confidence interval: mean ± this covers the true mean with the given probability.

        By the normal approximation, for independent values, about 30 and more.
        """
        return NormalDist().inv_cdf(0.5 + confidence / 2) * self.std / math.sqrt(self.count) if self.count else math.nan
