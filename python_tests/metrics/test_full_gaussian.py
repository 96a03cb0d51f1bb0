"""The Gaussian with full covariance, against formulas and another library's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hflow_fast.metrics import FullGaussian, PixelGaussian


def correlated(count: int, seed: int = 0) -> Tensor:
    """Images (N, 3, 3, 3) whose pixels have much in common."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 1, 1, 1, generator=generator)
    own = torch.randn(count, 3, 3, 3, generator=generator)
    return (128 + 40 * common + 8 * own).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("bits", [8, 5])
def test_fit_against_torch(bits: int) -> None:
    images = correlated(300)
    fitted = FullGaussian.fit(images, bits, shrinkage=0.25)
    values = ((images >> (8 - bits)).flatten(1).double() + 0.5) / 2**bits - 0.5
    covariance = torch.cov(values.T, correction=0) + torch.eye(27, dtype=torch.float64) / (12 * 4**bits)
    covariance = torch.where(torch.eye(27) == 1, covariance, 0.75 * covariance)
    torch.testing.assert_close(fitted.mean, values.mean(dim=0))
    torch.testing.assert_close(fitted.covariance, covariance, rtol=1e-9, atol=1e-12)


def test_bits_are_those_of_the_density_in_the_mean_over_the_noise() -> None:
    fitted = FullGaussian.fit(correlated(200), shrinkage=0.1)
    images = correlated(3, seed=1)
    noise = torch.rand(40_000, 1, 27, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = (images.flatten(1) + noise) / 256 - 0.5
    density = torch.distributions.MultivariateNormal(fitted.mean, fitted.covariance)
    samples = -density.log_prob(x) / (27 * math.log(2)) + 8
    error = samples.std(dim=0) / math.sqrt(len(noise))
    assert ((fitted.bits_per_dim(images) - samples.mean(dim=0)).abs() < 5 * error).all()


def test_diagonal_is_the_pixel_gaussian() -> None:
    images = correlated(600)
    full, pixels = FullGaussian.fit(images, shrinkage=1.0), PixelGaussian.fit(images)
    torch.testing.assert_close(full.bits_per_dim(images), pixels.bits_per_dim(images), rtol=1e-8, atol=1e-8)


def test_what_pixels_have_in_common_saves_bits() -> None:
    train, held_out = correlated(2000), correlated(500, seed=1)
    full, pixels = FullGaussian.fit(train), PixelGaussian.fit(train)
    gain = float((pixels.bits_per_dim(held_out) - full.bits_per_dim(held_out)).mean())
    # Of the determinant: 27 values of variance 1664 against 26 of 64 and one of 64 + 27 · 1600.
    expected = (27 * math.log2(1664) - 26 * math.log2(64) - math.log2(64 + 27 * 1600)) / 54
    assert gain == pytest.approx(expected, abs=0.05)


def test_shrinkage_is_chosen_by_what_was_not_fitted() -> None:
    few, many = FullGaussian.fit(correlated(60)), FullGaussian.fit(correlated(5000))
    assert many.shrinkage < few.shrinkage < 1
    held_out = correlated(2000, seed=1)
    best = min(float(FullGaussian.fit(correlated(60), shrinkage=value).bits_per_dim(held_out).mean())
               for value in (0.0, 0.03, 0.1, 0.3))
    assert float(few.bits_per_dim(held_out).mean()) < best + 0.05
    assert FullGaussian.fit(correlated(9)).shrinkage == 1.0


def test_shrinkage_against_a_slow_search() -> None:
    images = correlated(50)
    folds = images.split(10)

    def cost(shrinkage: float) -> float:
        total = 0.0
        for k, fold in enumerate(folds):
            others = torch.cat([*folds[:k], *folds[k + 1:]])
            total += float(FullGaussian.fit(others, shrinkage=shrinkage).bits_per_dim(fold).sum())
        return total

    chosen = FullGaussian.fit(images).shrinkage
    assert 0 < chosen < 1
    assert cost(chosen) <= min(map(cost, (0.0, 1e-3, 1e-2, 3e-2, 0.1, 0.3))) + 1e-6


def test_constant_pixels_and_single_images() -> None:
    images = torch.full((20, 3, 2, 2), 7, dtype=torch.uint8)
    # All the density there is falls into one bin: −log₂ of a normal density of variance 1/12 at 1/12 from its mean.
    expected = 0.5 * math.log2(2 * math.pi / 12) + 0.5 / math.log(2)
    assert FullGaussian.fit(images).bits_per_dim(images[:1]).item() == pytest.approx(expected, abs=1e-6)
    assert FullGaussian.fit(images[:1]).bits_per_dim(images).shape == (20,)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no images"):
        FullGaussian.fit(correlated(0))
    with pytest.raises(ValueError, match="shrinkage"):
        FullGaussian.fit(correlated(3), shrinkage=1.5)
