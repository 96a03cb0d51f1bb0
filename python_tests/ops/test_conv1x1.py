from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast import reference
from hflow_fast.ops import conv1x1

from ._cases import DTYPES, MEMORY, assert_accurate, atol_of, same_bits_for_any_thread_count, tensor

# Tiles of the kernel end at 4096 elements and vectors at 16 pixels: sizes fall on both sides of either.
CHANNELS = st.one_of(st.integers(1, 9), st.sampled_from([12, 13, 24, 31, 32]))
SHAPES = st.one_of(
    st.tuples(st.integers(1, 70), CHANNELS),
    st.tuples(st.integers(1, 3), CHANNELS, st.integers(1, 600)),
    st.tuples(st.integers(1, 3), CHANNELS, st.integers(1, 33), st.integers(1, 33)),
)


def inputs(shape, dtype=torch.float64, memory="contiguous", parameter_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = parameter_dtype or dtype
    x = tensor(shape, dtype, memory, generator)
    weight = tensor((shape[1], shape[1]), parameter_dtype, memory, generator)
    return x, weight, tensor((shape[1],), parameter_dtype, memory, generator)


def one(function):
    return lambda *tensors: (function(*tensors),)


def kernel(x, weight, bias):
    """The kernel also where ops.conv1x1 prefers a matrix product."""
    return torch.ops.hflow_fast.conv1x1_fwd.default(x, weight, bias)


def by_definition(x, weight, bias):
    result = torch.einsum("oc,bc...->bo...", weight, x)
    return result + bias.reshape(-1, *(1,) * (x.dim() - 2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(MEMORY), st.booleans())
def test_matches_the_reference(shape, dtype, memory, float32_parameters):
    tensors = inputs(shape, dtype, memory, torch.float32 if float32_parameters else None)
    assert_accurate(one(kernel), one(reference.conv1x1), tensors, atol_of(*tensors))


@pytest.mark.parametrize("function", [conv1x1, reference.conv1x1])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 4, 5), (2, 40, 4, 5), (3, 40, 2, 3), (0, 40, 2, 3), (3, 40, 1, 1),
     (2, 5, 7), (2, 40, 7), (2, 40, 3), (4, 40)],
)  # fmt: skip
def test_is_a_matrix_per_pixel(function, shape, memory):
    x, weight, bias = inputs(shape, memory=memory)
    expected = by_definition(x, weight, bias)
    torch.testing.assert_close(function(x, weight, bias), expected, rtol=1e-12, atol=1e-12)
    expected = by_definition(x, weight, torch.zeros_like(bias))
    torch.testing.assert_close(function(x, weight), expected, rtol=1e-12, atol=1e-12)
    assert function(x, weight).stride() == reference.conv1x1(x, weight).stride()


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3), (2, 3, 2, 2), (2, 14, 2, 2)])
def test_gradcheck(shape):
    tensors = [t.requires_grad_() for t in inputs(shape)]
    assert torch.autograd.gradcheck(conv1x1, tensors)
    assert torch.autograd.gradcheck(conv1x1, tensors[:2])


def test_round_trip():
    x, weight, bias = inputs((2, 8, 5, 5))
    inverse = torch.linalg.inv(weight)
    again = conv1x1(conv1x1(x, weight, bias), inverse, -inverse @ bias)
    torch.testing.assert_close(again, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_the_widest_kernel_has_the_same_bits_for_any_thread_count(memory):
    assert same_bits_for_any_thread_count(one(kernel), inputs((2, 32, 90, 90), torch.float32, memory))


def test_not_a_number_stays_in_its_pixel():
    x = torch.ones(1, 2, 3)
    x[0, 1, 1] = float("nan")
    y = conv1x1(x, torch.eye(2) + 1)
    assert torch.isnan(y).tolist() == [[[False, True, False], [False, True, False]]]


@pytest.mark.parametrize("function", [conv1x1, reference.conv1x1, kernel])
@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3, 2),
            torch.zeros(3),
            r"conv1x1: weight must have shape \(3, 3\), got \(3, 2\)",
        ),
        (torch.zeros(2, 3), torch.zeros(3, 3, 1, 1), torch.zeros(3), r"conv1x1: weight must have shape \(3, 3\), got"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 3), torch.zeros(1), r"conv1x1: bias must have shape \(3,\), got \(1,\)"),
        (torch.zeros(3), torch.zeros(3, 3), torch.zeros(3), r"conv1x1: x must have shape \(B, C, ...\), got \(3,\)"),
        (torch.zeros(2, 3).long(), torch.zeros(3, 3), torch.zeros(3), "conv1x1: x must be float32, .* got"),
        (torch.zeros(2, 3), torch.zeros(3, 3).int(), torch.zeros(3), "conv1x1: weight must be float32, .* got"),
    ],
)
def test_bad_input_is_named(function, x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        function(x, weight, bias)


def test_the_kernel_says_where_it_ends():
    with pytest.raises(ValueError, match="x must have at most 32 channels here, got 33"):
        kernel(torch.zeros(1, 33), torch.zeros(33, 33), torch.zeros(33))
