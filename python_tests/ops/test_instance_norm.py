from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast import reference
from hflow_fast.ops import instance_norm

from ._cases import DTYPES, MEMORY, assert_accurate, atol_of, run, same_bits_for_any_thread_count, tensor

SHAPES = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(2, 200)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 200)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 33), st.integers(1, 33)),
    st.tuples(st.integers(1, 3), st.integers(60, 140), st.integers(2, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(2, 40), st.just(1), st.just(1)),
)


def inputs(shape, dtype=torch.float64, memory="contiguous"):
    return tensor(shape, dtype, memory, torch.Generator().manual_seed(0))


def alone(function, **options):
    """As a function that returns a tuple, for what all tests share."""
    return lambda x: (function(x, **options),)


def growth(x, epsilon):
    """By how much a rounding error of x can grow: few values may lie close together."""
    values = x.double().flatten(2) if x[0, 0].numel() > 1 else x.double().flatten(1)[:, None]
    return float((values.var(-1) + epsilon).rsqrt().max().clamp(min=1))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(MEMORY), st.sampled_from([1e-6, 0.3]))
def test_matches_the_reference(shape, dtype, memory, epsilon):
    x = inputs(shape, dtype, memory)
    functions = (alone(function, epsilon=epsilon) for function in (instance_norm, reference.instance_norm))
    assert_accurate(*functions, [x], atol_of(x) * growth(x, epsilon))


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


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3), (2, 3, 2, 2), (2, 3, 1, 1)])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_gradcheck(shape, memory):
    assert torch.autograd.gradcheck(instance_norm, inputs(shape, memory=memory).requires_grad_())


@pytest.mark.parametrize("memory", MEMORY)
def test_opcheck(memory):
    x = inputs((2, 3, 4, 5), torch.float32, memory)
    torch.library.opcheck(torch.ops.hflow_fast.instance_norm_fwd.default, (x.clone().requires_grad_(), 1e-6))
    torch.library.opcheck(torch.ops.hflow_fast.instance_norm_bwd.default, (x, torch.randn_like(x), 1e-6))


def test_differentiating_twice_is_refused():
    x = inputs((2, 3, 4, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(instance_norm(x)[0, 0, 0, 0], x, create_graph=True)
    with pytest.raises(RuntimeError, match="instance_norm has no second derivative; .*reference.instance_norm"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 3), (2, 0), (1, 1, 1, 2), (1, 2)])
def test_empty_and_smallest(shape):
    x = inputs(shape, torch.float32)
    functions = alone(instance_norm), alone(reference.instance_norm)
    for ours, theirs in zip(*(run(function, [x]) for function in functions), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("memory", MEMORY)
def test_keeps_the_memory_format(memory):
    y = instance_norm(inputs((2, 3, 4, 5), torch.float32, memory))
    assert y.is_contiguous(memory_format=torch.channels_last if memory == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_same_bits_for_any_thread_count(memory):
    assert same_bits_for_any_thread_count(alone(instance_norm), [inputs((3, 70, 50, 30), torch.float32, memory)])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_the_networks_precision_under_autocast(dtype):
    x = inputs((2, 3, 4, 4), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = instance_norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, instance_norm(x))


def test_compiles_to_one_graph():
    x = inputs((2, 3, 4, 4), torch.float32)
    compiled = torch.compile(alone(instance_norm), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, [x]), run(alone(instance_norm), [x]), strict=True):
        torch.testing.assert_close(ours, eager)


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
    with pytest.raises(ValueError, match=r"instance_norm: grad_y must have the shape of x, \(2, 3, 4\), .* got \(2, 3\)"):
        torch.ops.hflow_fast.instance_norm_bwd(torch.zeros(2, 3, 4), torch.zeros(2, 3), 1e-6)
