from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast import reference
from hflow_fast.ops import CouplingSpec, coupling, flow_step

from ._cases import (
    DTYPES,
    MEMORY,
    assert_accurate,
    atol_of,
    coupling_cases,
    log_det_of_jacobian,
    run,
    same_bits_for_any_thread_count,
    tensor,
)

HFLOW = CouplingSpec("exp_clip", shift_clamp=5.0, active="checkerboard", block=2)


def inputs(shape, raw_channels, dtype=torch.float64, raw_dtype=None, parameter_dtype=None, memory="contiguous"):
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    return (
        tensor(shape, dtype, memory, generator),
        1.5 * tensor((shape[0], raw_channels, *shape[2:]), raw_dtype or dtype, memory, generator),
        tensor((channels, channels), parameter_dtype or dtype, memory, generator),
        tensor((channels,), parameter_dtype or dtype, memory, generator),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    coupling_cases(),
    st.sampled_from(DTYPES),
    st.sampled_from(MEMORY),
    st.booleans(),
    st.sampled_from([None, torch.bfloat16]),
    st.sampled_from([None, torch.float32]),
)
def test_matches_the_reference(case, dtype, memory, inverse, raw_dtype, parameter_dtype):
    spec, shape, raw_channels = case
    tensors = inputs(shape, raw_channels, dtype, raw_dtype, parameter_dtype, memory)
    assert_accurate(
        lambda *t: flow_step(*t, spec, inverse=inverse),
        lambda *t: reference.flow_step(*t, spec, inverse=inverse),
        tensors,
        atol_of(*tensors),
    )


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [(2, 32, 9, 9), (2, 33, 5, 5), (3, 64, 1, 1), (200, 2), (70, 16), (1, 3, 65, 67), (2, 12, 3000), (5, 8, 2, 2)],
)
def test_tile_edges_match_the_reference(shape, memory):
    spec = CouplingSpec("sigmoid", active="channels", layout="interleaved")
    tensors = inputs(shape, spec.raw_channels(shape[1]), memory=memory)
    assert_accurate(lambda *t: flow_step(*t, spec), lambda *t: reference.flow_step(*t, spec), tensors, 1e-14)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2, 2), (2, 2, 3)])
def test_gradcheck(shape, inverse):
    tensors = [t.requires_grad_() for t in inputs(shape, 2 * shape[1])]
    spec = CouplingSpec("exp_tanh", active="channels")
    assert torch.autograd.gradcheck(lambda *t: flow_step(*t, spec, inverse=inverse), tensors)


@pytest.mark.parametrize("inverse", [False, True])
def test_log_det_is_the_couplings(inverse):
    x, raw, weight, bias = inputs((2, 3, 2, 4), 6)
    y, log_det = flow_step(x, raw, weight, bias, HFLOW, inverse=inverse)
    jacobians = torch.cat(
        [
            log_det_of_jacobian(
                lambda t, i=i: flow_step(t, raw[i : i + 1], weight, bias, HFLOW, inverse=inverse)[0], x[i : i + 1]
            )
            for i in range(2)
        ]
    )
    torch.testing.assert_close(log_det + 8 * torch.linalg.slogdet(weight).logabsdet, jacobians)
    u = torch.einsum("oc,bchw->bohw", torch.linalg.inv(weight), y - bias[:, None, None])
    again, opposite = coupling(u, raw, HFLOW, inverse=not inverse)
    torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(opposite, -log_det)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 4, 90, 70), (300, 6, 3, 3), (30000, 3)])
def test_same_bits_for_any_thread_count(shape, memory):
    spec = HFLOW if len(shape) == 4 else CouplingSpec("exp_clip", active="channels")
    tensors = inputs(shape, 2 * shape[1], torch.float32, memory=memory)
    assert same_bits_for_any_thread_count(lambda *t: flow_step(*t, spec), tensors)


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 0, 4, 4), (2, 4, 0, 4), (0, 4), (1, 1, 1, 1), (2, 1)])
def test_empty_and_single(shape):
    tensors = inputs(shape, 2 * shape[1], torch.float32)
    theirs = run(lambda *t: reference.flow_step(*t, CouplingSpec()), tensors)
    for a, b in zip(run(lambda *t: flow_step(*t), tensors), theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory", MEMORY)
def test_opcheck(memory):
    tensors = inputs((2, 3, 4, 5), 6, torch.float32, memory=memory)
    arguments = (*HFLOW.arguments, False)
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.hflow_fast.flow_step_fwd.default, (*leaves, *arguments))
    gradients = (torch.randn(2, 3, 4, 5), torch.randn(2))
    torch.library.opcheck(torch.ops.hflow_fast.flow_step_bwd.default, (*tensors, *gradients, *arguments))


@pytest.mark.parametrize("channels", [3, 40])
def test_flow_variables_stay_float32_under_autocast(channels):
    tensors = inputs((2, channels, 4, 4), 2 * channels, torch.bfloat16, parameter_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = flow_step(*tensors, HFLOW)
    assert (y.dtype, log_det.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y, flow_step(*(t.float() for t in tensors), HFLOW)[0])


def test_compiles_to_one_graph():
    tensors = inputs((2, 3, 4, 4), 6, torch.float32)
    compiled = torch.compile(lambda *t: flow_step(*t, HFLOW), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, tensors), run(lambda *t: flow_step(*t, HFLOW), tensors), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("function", [flow_step, reference.flow_step])
@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(3), r"flow_step: x must have shape \(B, C, ...\), got \(3,\)"),
        (1, torch.zeros(2, 5, 4, 4), r"flow_step: raw must have 6 channels, got \(2, 5, 4, 4\)"),
        (2, torch.zeros(3, 4), r"flow_step: weight must have shape \(3, 3\), got \(3, 4\)"),
        (3, torch.zeros(4), r"flow_step: bias must have shape \(3,\), got \(4,\)"),
        (2, torch.zeros(3, 3, dtype=torch.int32), "flow_step: weight must be float32, .* got"),
    ],
)
def test_bad_input_is_named(function, changed, value, message):
    tensors = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4), torch.zeros(3, 3), torch.zeros(3)]
    tensors[changed] = value
    with pytest.raises(ValueError, match=message):
        function(*tensors, CouplingSpec())
