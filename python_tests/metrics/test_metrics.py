"""Bits per dimension, the baselines, and the mean with its uncertainty."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, Uniform

from hflow_fast.data import dequantize
from hflow_fast.metrics import PixelGaussian, RunningMean, bits_per_dim, uniform_bits_per_dim


@pytest.fixture
def images() -> torch.Tensor:
    """Different mean and spread at every pixel, and one pixel that never changes."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.randint(2, 60, (3, 2, 2), generator=generator)
    values = (128 + scale * torch.randn(300, 3, 2, 2, generator=generator)).clamp(0, 255).to(torch.uint8)
    values[:, 0, 0, 0] = 255
    return values


def test_bits_per_dim_is_the_code_length_of_a_pixel():
    # A density that is uniform over 4 of the 256 bins of each of 5 values: log2(4) bits each.
    density = Uniform(0.0, 4 / 256).log_prob(torch.full((5,), 0.01)).sum()
    assert bits_per_dim(-density, 5).item() == pytest.approx(2.0)
    assert bits_per_dim(-5 * math.log(256 / 4), 5) == pytest.approx(2.0)
    assert bits_per_dim(torch.zeros(3), 7, bits=5).tolist() == [5.0] * 3
    assert uniform_bits_per_dim() == 8.0 and uniform_bits_per_dim(5) == 5.0


@pytest.mark.parametrize("bits", [8, 5])
def test_the_fit_is_the_moments_of_dequantised_images(images: torch.Tensor, bits: int):
    gaussian = PixelGaussian.fit(images, bits)
    low = (images >> (8 - bits)).double() / 2**bits - 0.5  # each value is uniform from here to one bin above
    ends = torch.stack([low, low + 2.0**-bits])
    mean = ends.mean((0, 1))
    torch.testing.assert_close(gaussian.mean, mean)
    second = (ends[0].square() + ends[0] * ends[1] + ends[1].square()) / 3  # E[x²] of U(a, b)
    torch.testing.assert_close(gaussian.variance, second.mean(0) - mean.square(), rtol=1e-9, atol=1e-12)
    assert gaussian.variance[0, 0, 0].item() == pytest.approx(1 / 12 / 4**bits)


@pytest.mark.parametrize("bits", [8, 5])
def test_its_likelihood_is_that_of_torch_distributions(images: torch.Tensor, bits: int):
    gaussian = PixelGaussian.fit(images[:200], bits)
    normal = Normal(gaussian.mean, gaussian.variance.sqrt())
    held_out = images[200:]
    # Simpson's rule is exact for the quadratic log-density over a bin.
    low = (held_out >> (8 - bits)).double() / 2**bits - 0.5
    a, middle, b = (normal.log_prob(low + part * 2.0**-bits) for part in (0, 0.5, 1))
    expected = bits_per_dim(-((a + 4 * middle + b) / 6).sum((1, 2, 3)), 12, bits)
    torch.testing.assert_close(gaussian.bits_per_dim(held_out), expected)


def test_it_is_in_the_units_of_dequantised_samples(images: torch.Tensor):
    gaussian = PixelGaussian.fit(images)
    normal = Normal(gaussian.mean, gaussian.variance.sqrt())
    x = dequantize(images.repeat(200, 1, 1, 1), generator=torch.Generator().manual_seed(1)).double()
    sampled = bits_per_dim(-normal.log_prob(x).sum((1, 2, 3)), 12).view(200, -1)
    error = sampled.mean(1).std() / 200**0.5
    assert abs(sampled.mean() - gaussian.bits_per_dim(images).mean()) < 5 * error


def test_no_other_gaussian_fits_better(images: torch.Tensor):
    best = PixelGaussian.fit(images)
    here = best.bits_per_dim(images).mean()
    for mean, variance in ((1.01, 1), (0.99, 1), (1, 1.02), (1, 0.98)):
        other = PixelGaussian(best.mean * mean, best.variance * variance, 8)
        assert other.bits_per_dim(images).mean() > here


def test_more_images_than_one_chunk_are_no_different(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    whole = PixelGaussian.fit(images)
    monkeypatch.setattr("hflow_fast.metrics.baselines._CHUNK", 7)
    pieces = PixelGaussian.fit(images)
    assert torch.equal(whole.mean, pieces.mean) and torch.equal(whole.variance, pieces.variance)
    assert torch.equal(whole.bits_per_dim(images), pieces.bits_per_dim(images)) and len(images) > 256


def test_running_mean_does_not_depend_on_the_batches():
    values = 1e6 + torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    running = RunningMean()
    for part in values.split([1, 0, 13, 486, 500]):
        running.update(part)
    assert running.count == 1000
    assert running.mean == pytest.approx(values.mean().item(), rel=1e-14)
    assert running.std == pytest.approx(values.std().item(), rel=1e-9)
    assert running.half_width() == pytest.approx(1.959964 * values.std().item() / 1000**0.5, rel=1e-6)


def test_the_confidence_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(1000):
        running = RunningMean()
        running.update(torch.rand(50, generator=generator))
        inside += abs(running.mean - 0.5) < running.half_width(0.9)
    assert 860 <= inside <= 930


def test_too_few_values_have_no_uncertainty():
    running = RunningMean()
    assert math.isnan(running.mean) and math.isnan(running.half_width())
    running.update(torch.tensor([2.0]))
    assert running.mean == 2.0 and math.isnan(running.std) and math.isnan(running.half_width())
