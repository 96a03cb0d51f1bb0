from __future__ import annotations

import pytest
import torch

from hflow_fast import reference
from hflow_fast.ops import instance_norm

from ._cases import assert_accurate, atol_of, tensor


def inputs(shape, dtype=torch.float64, memory="contiguous"):
    return tensor(shape, dtype, memory, torch.Generator().manual_seed(0))


def alone(function, **options):
    """As a function that returns a tuple, for what all tests share."""
    return lambda x: (function(x, **options),)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_pixels(dtype, memory):
    x = inputs((2, 40, 100, 130), dtype, memory)
    assert_accurate(alone(instance_norm), alone(reference.instance_norm), [x], atol_of(x))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_a_large_mean_costs_no_accuracy(memory):
    x = (1000 + inputs((2, 3, 64, 65), torch.float32)).contiguous(
        memory_format=torch.channels_last if memory == "channels_last" else torch.contiguous_format
    )
    torch.testing.assert_close(instance_norm(x).double(), reference.instance_norm(x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", [instance_norm, reference.instance_norm])
def test_is_the_librarys_norm_with_another_variance(function):
    x = inputs((2, 3, 5, 7))
    ratio = 34 / 35
    expected = torch.nn.functional.instance_norm(x, eps=1e-6 * ratio) * ratio**0.5
    torch.testing.assert_close(function(x), expected)
    pixel = inputs((2, 8, 1, 1))
    expected = torch.nn.functional.layer_norm(pixel, (8, 1, 1), eps=1e-6 * 7 / 8) * (7 / 8) ** 0.5
    torch.testing.assert_close(function(pixel), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_not_a_number_and_infinity_spoil_their_channel_only(bad, memory):
    x = inputs((2, 3, 4, 5), torch.float32, memory)
    x[0, 1, 2, 3] = bad
    spoiled = torch.zeros(2, 3, dtype=torch.bool)
    spoiled[0, 1] = True
    assert torch.equal(instance_norm(x).isnan(), spoiled[..., None, None].expand(x.shape))


def test_a_constant_channel_becomes_zero():
    assert torch.equal(instance_norm(torch.full((1, 2, 8, 9), 0.1)), torch.zeros(1, 2, 8, 9))


@pytest.mark.parametrize("function", [instance_norm, reference.instance_norm, torch.ops.hflow_fast.instance_norm_fwd])
@pytest.mark.parametrize(
    ("x", "epsilon", "message"),
    [
        (torch.zeros(3), 1e-6, r"instance_norm: x must have shape \(B, C, ...\), got \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), 1e-6, "instance_norm: x must be float32, .* got"),
        (torch.zeros(2, 1, 1, 1), 1e-6, r"more than one channel of a single pixel, got \(2, 1, 1, 1\)"),
        (torch.zeros(2, 1), 1e-6, r"instance_norm: x must have more than one pixel, .* got \(2, 1\)"),
        (torch.zeros(2, 3, 4), 0.0, "instance_norm: epsilon must be above 0, got 0"),
        (torch.zeros(2, 3, 4), float("nan"), "instance_norm: epsilon must be above 0, got nan"),
    ],
)
def test_bad_input_is_named(function, x, epsilon, message):
    options = {"epsilon": epsilon}
    with pytest.raises(ValueError, match=message):
        function(x, **options)


def test_bad_gradient_is_named():
    with pytest.raises(ValueError, match=r"instance_norm: grad_y must have the shape of x, \(2, 3, 4\), .* got \(2, 3"):
        torch.ops.hflow_fast.instance_norm_bwd(torch.zeros(2, 3, 4), torch.zeros(2, 3), 1e-6)
