from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast import reference
from hflow_fast.ops import bias_act

from ._cases import DTYPES, MEMORY, assert_accurate, atol_of, run, same_bits_for_any_thread_count, tensor

ACTIVATIONS = ("linear", "leaky_relu", "tanh")
SHAPES = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 200)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 33), st.integers(1, 33)),
)
OPTIONS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(ACTIVATIONS),
        "slope": st.sampled_from([0.0, 0.1]),
        "gain": st.sampled_from([1.0, math.sqrt(0.5)]),
    }
)


def inputs(shape, dtype=torch.float64, memory="contiguous", parameter_dtype=None):
    """x, bias and residual."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (tensor(shape, dtype, memory, generator) for _ in range(2))
    return x, tensor((shape[1],), parameter_dtype or dtype, memory, generator), residual


def alone(function, **options):
    """As a function that returns a tuple, for what all tests share."""
    return lambda *tensors: (function(*tensors, **options),)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(MEMORY), OPTIONS, st.integers(1, 3), st.booleans())
def test_matches_the_reference(shape, dtype, memory, options, count, float32_bias):
    tensors = inputs(shape, dtype, memory, torch.float32 if float32_bias else None)[:count]
    assert_accurate(alone(bias_act, **options), alone(reference.bias_act, **options), tensors, atol_of(*tensors))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_without_a_bias_and_of_another_dtype(dtype):
    x, _, residual = inputs((2, 5, 9, 13), torch.bfloat16)
    tensors = x, residual.to(dtype)
    functions = (lambda t, r, f=f: (f(t, None, r, activation="leaky_relu"),) for f in (bias_act, reference.bias_act))
    assert_accurate(*functions, tensors, atol_of(*tensors))


@pytest.mark.parametrize("function", [bias_act, reference.bias_act])
def test_by_hand(function):
    x, bias = torch.tensor([[-3.0, 1.0]]), torch.tensor([1.0, 1.0])
    residual = torch.tensor([[1.0, 2.0]])
    y = function(x, bias, residual, activation="leaky_relu", slope=0.25, gain=10.0)
    torch.testing.assert_close(y, torch.tensor([[5.0, 40.0]]))
    torch.testing.assert_close(function(x, activation="tanh"), torch.tanh(x))
    assert torch.equal(function(x), x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3), (2, 3, 2, 2)])
def test_gradcheck(shape, activation):
    tensors = [t.requires_grad_() for t in inputs(shape)]
    assert torch.autograd.gradcheck(alone(bias_act, activation=activation, gain=0.7), tensors)


def test_the_slope_is_leaky_relus_derivative_at_zero():
    x = torch.zeros(1, 2, requires_grad=True)
    bias_act(x, activation="leaky_relu", slope=0.1).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((1, 2), 0.1))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
def test_opcheck(memory, with_residual):
    x, bias, residual = inputs((2, 3, 4, 5), torch.float32, memory)
    tensors = x, bias, residual if with_residual else x.new_empty(0)
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.hflow_fast.bias_act_fwd.default, (*leaves, 1, 0.1, 0.7))
    torch.library.opcheck(torch.ops.hflow_fast.bias_act_bwd.default, (*tensors, torch.randn_like(x), 2, 0.1, 0.7))


def test_differentiating_twice_is_refused():
    tensors = [t.requires_grad_() for t in inputs((2, 3))]
    y = bias_act(*tensors, activation="tanh")
    (gradient,) = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="bias_act has no second derivative; .*reference.bias_act"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 3), (1, 1, 1, 1)])
def test_empty_and_single(shape):
    functions = (alone(function, activation="leaky_relu") for function in (bias_act, reference.bias_act))
    for ours, theirs in zip(*(run(function, inputs(shape, torch.float32)) for function in functions), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("memory", MEMORY)
def test_keeps_the_memory_format(memory):
    y = bias_act(*inputs((2, 3, 4, 5), torch.float32, memory))
    assert y.is_contiguous(memory_format=torch.channels_last if memory == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_same_bits_for_any_thread_count(memory):
    tensors = inputs((3, 5, 150, 100), torch.float32, memory)
    assert same_bits_for_any_thread_count(alone(bias_act, activation="tanh"), tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_and_infinity_propagate(activation):
    x = torch.tensor([[1.0, float("nan"), float("inf"), -float("inf")]])
    y, expected = (f(x, torch.ones(4), activation=activation) for f in (bias_act, reference.bias_act))
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_the_networks_precision_under_autocast(dtype):
    x, bias, residual = inputs((2, 3, 4, 4), dtype, parameter_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = bias_act(x, bias, residual.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y, bias_act(x, bias, residual))


@pytest.mark.parametrize("count", [1, 3])
def test_compiles_to_one_graph(count):
    tensors = inputs((2, 3, 4, 4), torch.float32)[:count]
    function = alone(bias_act, activation="leaky_relu", gain=0.7)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, tensors), run(function, tensors), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("function", [bias_act, reference.bias_act])
@pytest.mark.parametrize(
    ("x", "bias", "residual", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2), None, r"bias_act: bias must have shape \(3,\), got \(2,\)"),
        (torch.zeros(2, 3), None, torch.zeros(2, 4), r"residual must have the shape of x, \(2, 3\), .* got \(2, 4\)"),
        (torch.zeros(2, 3), None, torch.zeros(2), r"residual must have the shape of x, \(2, 3\), .* got \(2,\)"),
        (torch.zeros(2, 3), None, torch.zeros(0), r"residual must have the shape of x, \(2, 3\), .* got \(0,\)"),
        (torch.zeros(3), None, None, r"bias_act: x must have shape \(B, C, ...\), got \(3,\)"),
        (torch.zeros(2, 3).int(), torch.zeros(3), None, "bias_act: x must be float32, .* got"),
        (torch.zeros(2, 3), torch.zeros(3).bool(), None, "bias_act: bias must be float32, .* got"),
        (torch.zeros(2, 3), None, torch.zeros(2, 3).bool(), "bias_act: residual must be float32, .* got"),
    ],
)
def test_bad_input_is_named(function, x, bias, residual, message):
    with pytest.raises(ValueError, match=message):
        function(x, bias, residual)


@pytest.mark.parametrize("function", [bias_act, reference.bias_act])
def test_unknown_activation_is_named(function):
    with pytest.raises(ValueError, match="activation must be one of linear, leaky_relu, tanh, got 'relu'"):
        function(torch.zeros(2, 3), activation="relu")


@pytest.mark.parametrize("number", [-1, 3])
def test_bad_arguments_of_the_kernel_are_named(number):
    x, bias, none = torch.zeros(2, 3), torch.zeros(3), torch.zeros(0)
    with pytest.raises(ValueError, match=f"bias_act: activation must be from 0 to 2, got {number}"):
        torch.ops.hflow_fast.bias_act_fwd(x, bias, none, number, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"bias_act: grad_y must have the shape of x, \(2, 3\), .* got \(2, 4\)"):
        torch.ops.hflow_fast.bias_act_bwd(x, bias, none, torch.zeros(2, 4), 0, 0.1, 1.0)
