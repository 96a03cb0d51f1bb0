"""Whether two implementations are the same function, before they are timed: for the programs in ``benchmarks/``."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["float64_by_default", "relative", "smooth_images", "typical_norm", "worst_gradient"]

_NEGLIGIBLE = 1e-3
"""Of a typical gradient: smaller ones, of parameters without effect such as a bias before a norm, are rounding."""


def smooth_images(count: int, resolution: int, factor: int, device: torch.device) -> Tensor:
    """Random images (count, 3, R, R) in about [-0.5, 0.5] that change over ``factor`` pixels, with a little noise."""
    coarse = torch.rand(count, 3, resolution // factor, resolution // factor, device=device)
    x = F.interpolate(coarse, scale_factor=factor, mode="bilinear")
    return x - 0.5 + 0.02 * (torch.rand_like(x) - 0.5)


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    """For code that makes some of its constants without naming a type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def relative(value: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """‖value − expected‖ / ‖expected‖, or over ``least`` where that is more.

    Infinite where either is not finite: comparisons pass over NaN.
    """
    difference = float((value - expected).norm() / expected.norm().clamp_min(max(least, 1e-300)))
    return difference if math.isfinite(difference) else math.inf


def typical_norm(gradients: Iterable[Tensor]) -> float:
    """The median of their 2-norms."""
    return statistics.median(float(gradient.norm()) for gradient in gradients)


def worst_gradient(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], typical: float) -> tuple[str, float]:
    """The parameter whose gradients differ most, and by how much, relatively; beside ``typical`` ones negligible
    gradients count as of that size."""
    differences = {name: relative(found[name], gradient, _NEGLIGIBLE * typical) for name, gradient in expected.items()}
    worst = max(differences, key=differences.get)
    return worst, differences[worst]
