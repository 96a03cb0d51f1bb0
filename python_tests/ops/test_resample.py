from __future__ import annotations

import pytest
import torch

from hflow_fast import reference
from hflow_fast.ops import resample

from ._cases import assert_accurate, atol_of, tensor


def inputs(shape, dtype=torch.float64, memory="contiguous"):
    return tensor(shape, dtype, memory, torch.Generator().manual_seed(0))


def both(function, up):
    """As a function that returns a tuple, for what all tests share."""
    return lambda x: (function(x, up=up),)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("up", [False, True])
def test_images_in_bands_of_rows(up, dtype, memory):
    x = inputs((2, 3, 150, 190), dtype, memory)
    assert_accurate(both(resample, up), both(reference.resample, up), [x], atol_of(x))


@pytest.mark.parametrize("function", [resample, reference.resample])
def test_by_hand(function):
    row = torch.tensor([1.0, 5.0, 7.0, 2.0])
    x = row.expand(1, 1, 2, 4)
    down = torch.tensor([5 + 3 * (1 + 5) + 7, 5 + 3 * (7 + 2) + 7]) / 8
    torch.testing.assert_close(function(x), down.expand(1, 1, 1, 2))
    up = torch.tensor([4, 3 * 1 + 5, 3 * 5 + 1, 3 * 5 + 7, 3 * 7 + 5, 3 * 7 + 2, 3 * 2 + 7, 3 * 2 + 7]) / 4
    torch.testing.assert_close(function(x, up=True), up.expand(1, 1, 4, 8))


@pytest.mark.parametrize("function", [resample, reference.resample])
def test_reflects_the_edges_as_padding_does(function):
    x = inputs((2, 3, 6, 8))
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    kernel = torch.outer(taps, taps).expand(3, 1, 4, 4)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(function(x), torch.nn.functional.conv2d(padded, kernel, stride=2, groups=3))
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="reflect")
    bilinear = torch.nn.functional.interpolate(padded, scale_factor=2.0, mode="bilinear")[..., :12, :16]
    torch.testing.assert_close(function(x, up=True), bilinear)


@pytest.mark.parametrize("up", [False, True])
def test_both_memory_formats_have_the_same_bits(up):
    x = inputs((2, 5, 20, 24), torch.float32)
    y = resample(x.contiguous(memory_format=torch.channels_last), up=up)
    assert torch.equal(y, resample(x, up=up))


def test_not_a_number_reaches_what_the_filter_covers():
    x = torch.zeros(1, 1, 2, 12)
    x[..., 5] = float("nan")
    assert resample(x).isnan()[0, 0, 0].nonzero().flatten().tolist() == [2, 3]
    assert resample(x, up=True).isnan()[0, 0, 0].nonzero().flatten().tolist() == [9, 10, 11, 12]
    x[..., 5] = float("inf")
    y = torch.ops.hflow_fast.resample_fwd(x, False, True)  # the adjoint's missing edges are no 0·inf
    assert not y.isnan().any() and y.isinf().any()


@pytest.mark.parametrize("function", [resample, reference.resample])
@pytest.mark.parametrize(
    ("shape", "up", "message"),
    [
        ((2, 3), False, r"resample: x must have shape \(B, C, H, W\), got \(2, 3\)"),
        ((2, 3, 4), True, r"resample: x must have shape \(B, C, H, W\), got \(2, 3, 4\)"),
        ((2, 3, 4, 5), False, r"even H and W of at least 2 to be halved; pad or crop it, got \(2, 3, 4, 5\)"),
        ((2, 3, 0, 4), False, r"even H and W of at least 2 to be halved; pad or crop it, got \(2, 3, 0, 4\)"),
        ((2, 3, 4, 1), True, r"resample: x must have H and W of at least 2 to be doubled; .* got \(2, 3, 4, 1\)"),
    ],
)
def test_bad_input_is_named(function, shape, up, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape), up=up)


@pytest.mark.parametrize("size", [(2, 4), (3, 6)])
def test_bad_input_of_the_adjoint_is_named(size):
    with pytest.raises(ValueError, match="even H and W of at least 4 to be halved"):
        torch.ops.hflow_fast.resample_fwd(torch.zeros(1, 1, *size), True, True)


@pytest.mark.parametrize("function", [resample, reference.resample])
def test_bad_dtype_is_named(function):
    with pytest.raises(ValueError, match="resample: x must be float32, .* got"):
        function(torch.zeros(2, 3, 4, 4).int())
