from __future__ import annotations

import math

import pytest
import torch

from hflow_fast import reference
from hflow_fast.ops import haar

from ._cases import log_det_of_jacobian, tensor


def inputs(shape):
    return tensor(shape, torch.float64, "contiguous", torch.Generator().manual_seed(0))


@pytest.mark.parametrize("function", [haar, reference.haar])
def test_bands_and_channel_orders(function):
    p, q, r, s = 4.0, 2.0, 1.0, 7.0
    bands = torch.tensor([p + q + r + s, p - q + r - s, p + q - r - s, p - q - r + s]) / 2
    block = torch.tensor([[p, q], [r, s]])
    x = torch.stack([block, 10 * block])[None]
    torch.testing.assert_close(function(x)[0].flatten(), torch.cat([bands, 10 * bands]))
    wavelet = torch.stack([bands, 10 * bands], 1).flatten()
    torch.testing.assert_close(function(x, order="wavelet")[0].flatten(), wavelet)


@pytest.mark.parametrize("function", [haar, reference.haar])
def test_band_zero_is_the_mean_image(function):
    x = inputs((2, 3, 8, 8))
    y, log_det = function(x, order="wavelet", mean=True)
    torch.testing.assert_close(y[:, :3], torch.nn.functional.avg_pool2d(x, 2))
    torch.testing.assert_close(log_det, torch.full((2,), -3 * 16 * math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("order", ["colour", "wavelet"])
@pytest.mark.parametrize("size", [(16,), (8, 16), (4, 8, 4)])
def test_levels_are_the_transform_applied_again(size, order):
    x = inputs((2, 3, *size))
    options = {"order": order, "rebalance": 1.3, "mean": True}
    twice, first = haar(x, **options)
    twice, second = haar(twice, **options)
    y, log_det = haar(x, levels=2, **options)
    torch.testing.assert_close(y, twice)
    torch.testing.assert_close(log_det, first + second)


@pytest.mark.parametrize("size", [(4,), (2, 4), (2, 2, 4)])
@pytest.mark.parametrize("options", [{}, {"rebalance": 1.5}, {"mean": True}, {"rebalance": 0.8, "mean": True}])
def test_log_det_is_that_of_the_jacobian(options, size):
    x = inputs((2, 2, *size))
    y, log_det = haar(x, **options)
    torch.testing.assert_close(log_det, log_det_of_jacobian(lambda t: haar(t, **options)[0], x))
    _, inverse_log_det = haar(y, **options, inverse=True)
    jacobian = log_det_of_jacobian(lambda t: haar(t, **options, inverse=True)[0], y)
    torch.testing.assert_close(inverse_log_det, jacobian)


def test_orthonormal():
    x = inputs((2, 3, 8, 8))
    torch.testing.assert_close(haar(x, levels=3)[0].square().sum(), x.square().sum())


def test_not_a_number_stays_in_its_block():
    x = torch.zeros(1, 1, 2, 6)
    x[0, 0, 1, 2] = float("nan")
    assert haar(x)[0].isnan()[0, :, 0].tolist() == [[False, True, False]] * 4


@pytest.mark.parametrize("function", [haar, reference.haar])
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3), {}, r"haar: x must have shape \(B, C, L\), .* got \(2, 3\)"),
        ((2, 3, 4, 6), {"levels": 2}, r"sizes of x must be multiples of 4 for 2 level\(s\), got \(2, 3, 4, 6\)"),
        ((2, 3, 5), {}, r"spatial sizes of x must be multiples of 2 for 1 level\(s\), got \(2, 3, 5\)"),
        ((2, 6, 4, 4), {"inverse": True}, r"of 4 channels for the inverse of 1 level\(s\), got \(2, 6, 4, 4\)"),
        ((2, 3, 4, 4), {"levels": 0}, "haar: levels must be from 1 to 15, got 0"),
        ((2, 3, 4, 4), {"levels": 40}, "haar: levels must be from 1 to 15, got 40"),
        ((2, 3, 4, 4), {"order": "color"}, "haar: order must be 'colour' or 'wavelet', got 'color'"),
        ((2, 3, 4, 4), {"rebalance": 0.0}, "haar: rebalance must be above 0 and finite, got 0.0"),
        ((2, 3, 4, 4), {"rebalance": float("nan")}, "haar: rebalance must be above 0 and finite, got nan"),
    ],
)
def test_bad_input_is_named(function, shape, options, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape), **options)


@pytest.mark.parametrize("function", [haar, reference.haar])
def test_bad_dtype_is_named(function):
    with pytest.raises(ValueError, match="haar: x must be float32, .* got"):
        function(torch.zeros(2, 3, 4, 4).int())
