from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast import reference
from hflow_fast.ops import actnorm

from ._cases import (
    DTYPES,
    MEMORY,
    assert_accurate,
    atol_of,
    log_det_of_jacobian,
    run,
    same_bits_for_any_thread_count,
    tensor,
)

SHAPES = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 200)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 33), st.integers(1, 33)),
)


def inputs(shape, dtype=torch.float64, memory="contiguous", parameter_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = parameter_dtype or dtype
    x = tensor(shape, dtype, memory, generator)
    return x, *(tensor((shape[1],), parameter_dtype, memory, generator) for _ in range(2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(MEMORY), st.booleans(), st.booleans())
def test_matches_the_reference(shape, dtype, memory, inverse, float32_parameters):
    tensors = inputs(shape, dtype, memory, torch.float32 if float32_parameters else None)
    assert_accurate(
        lambda *t: actnorm(*t, inverse=inverse),
        lambda *t: reference.actnorm(*t, inverse=inverse),
        tensors,
        atol_of(*tensors),
    )


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3), (2, 3, 2, 2)])
def test_gradcheck(shape, inverse):
    tensors = [t.requires_grad_() for t in inputs(shape)]
    assert torch.autograd.gradcheck(lambda *t: actnorm(*t, inverse=inverse), tensors)


def test_round_trip_and_log_det():
    x, log_scale, bias = inputs((2, 3, 2, 2))
    y, log_det = actnorm(x, log_scale, bias)
    again, inverse_log_det = actnorm(y, log_scale, bias, inverse=True)
    torch.testing.assert_close(again, x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(inverse_log_det, -log_det)
    torch.testing.assert_close(log_det, log_det_of_jacobian(lambda t: actnorm(t, log_scale, bias)[0], x))


@pytest.mark.parametrize("memory", MEMORY)
def test_opcheck(memory):
    x, log_scale, bias = (t.requires_grad_() for t in inputs((2, 3, 4, 5), torch.float32, memory))
    torch.library.opcheck(torch.ops.hflow_fast.actnorm_fwd.default, (x, log_scale, bias, False))
    grads = torch.randn_like(x), torch.randn(2)
    tensors = [t.detach() for t in (x, log_scale, bias, *grads)]
    torch.library.opcheck(torch.ops.hflow_fast.actnorm_bwd.default, (*tensors, True))


def test_differentiating_twice_is_refused():
    x, log_scale, bias = (t.requires_grad_() for t in inputs((2, 3)))
    (gradient,) = torch.autograd.grad(actnorm(x, log_scale, bias)[0].sum(), log_scale, create_graph=True)
    with pytest.raises(RuntimeError, match="actnorm has no second derivative; .*reference.actnorm"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 3), (1, 1, 1, 1)])
def test_empty_and_single(shape):
    results = run(actnorm, inputs(shape, torch.float32))
    for ours, theirs in zip(results, run(reference.actnorm, inputs(shape, torch.float32)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("memory", MEMORY)
def test_keeps_the_memory_format(memory):
    x, log_scale, bias = inputs((2, 3, 4, 5), torch.float32, memory)
    y, _ = actnorm(x, log_scale, bias)
    assert y.is_contiguous(memory_format=torch.channels_last if memory == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_same_bits_for_any_thread_count(memory):
    tensors = inputs((3, 5, 150, 100), torch.float32, memory)
    assert same_bits_for_any_thread_count(actnorm, tensors)
    assert same_bits_for_any_thread_count(lambda *t: actnorm(*t, inverse=True), tensors)


def test_not_a_number_and_infinity_propagate():
    x = torch.tensor([[1.0, float("nan"), float("inf"), -float("inf")]])
    y, _ = actnorm(x, torch.zeros(4), torch.ones(4))
    torch.testing.assert_close(y, x + 1, equal_nan=True)


def test_flow_variables_stay_float32_under_autocast():
    x, log_scale, bias = inputs((2, 3, 4, 4), torch.bfloat16, parameter_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = actnorm(x, log_scale, bias)
    assert (y.dtype, log_det.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y, actnorm(x.float(), log_scale, bias)[0])


def test_compiles_to_one_graph():
    tensors = inputs((2, 3, 4, 4), torch.float32)
    compiled = torch.compile(lambda *t: actnorm(*t), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, tensors), run(actnorm, tensors), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("function", [actnorm, reference.actnorm, torch.ops.hflow_fast.actnorm_fwd])
@pytest.mark.parametrize(
    ("x", "log_scale", "bias", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2),
            torch.zeros(3),
            r"actnorm: log_scale must have shape \(3,\), got \(2,\)",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(3),
            torch.zeros(1, 3),
            r"actnorm: bias must have shape \(3,\), got \(1, 3\)",
        ),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3), r"actnorm: x must have shape \(B, C, ...\), got \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), torch.zeros(3), "actnorm: x must be float32, .* got"),
        (torch.zeros(2, 3), torch.zeros(3).bool(), torch.zeros(3), "actnorm: log_scale must be float32, .* got"),
    ],
)
def test_bad_input_is_named(function, x, log_scale, bias, message):
    arguments = (False,) if function not in (actnorm, reference.actnorm) else ()
    with pytest.raises(ValueError, match=message):
        function(x, log_scale, bias, *arguments)
