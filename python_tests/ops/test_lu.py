from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast import reference
from hflow_fast.ops import lu

from ._cases import DTYPES, run


def matrices(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def with_condition(n, condition, seed=0):
    """A float64 matrix with singular values from 1 down to 1/condition."""
    left, right = torch.linalg.qr(matrices((2, n, n), seed=seed))[0]
    return left * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ right


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(0, 20), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 9))
def test_values_and_gradients_are_exact_up_to_one_rounding(batch, n, dtype, transposed, seed):
    # Rotations and triangles keep the matrices well-conditioned, so that only rounding is left to see.
    weight = torch.linalg.qr(matrices((batch, n, n), seed=seed))[0] + 0.1 * matrices((batch, n, n), seed=seed).tril()
    weight = (weight.mT if transposed else weight).to(dtype)
    exact = run(reference.lu, [weight.double()])
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for number, (ours, theirs) in enumerate(zip(run(lu, [weight]), exact, strict=True)):
        expected_dtype = dtype if number == 2 else torch.promote_types(dtype, torch.float32)
        assert (ours.shape, ours.dtype) == (theirs.shape, expected_dtype)
        tolerance = (16 * n + 16) * (torch.finfo(dtype).eps if number == 2 else eps)
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * max(1, n))


@pytest.mark.parametrize("shape", [(3, 3), (2, 1, 1), (5, 4, 4), (2, 64, 64), (1, 65, 65)])
def test_inverts_and_pivots(shape):
    weight = matrices(shape)
    weight[..., 0, 0] = 0  # no factorisation without pivoting
    if shape[-1] == 1:
        weight = weight + 2
    log_abs_det, inverse = lu(weight)
    assert log_abs_det.shape == shape[:-2]
    torch.testing.assert_close(log_abs_det, torch.linalg.slogdet(weight).logabsdet, rtol=1e-12, atol=1e-12)
    identity = torch.eye(shape[-1], dtype=torch.float64).expand(shape)
    torch.testing.assert_close(weight @ inverse, identity, rtol=0, atol=1e-9)


def test_does_not_change_its_input():
    weight = matrices((3, 4, 4))
    before = weight.clone()
    lu(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("n", [3, 8, 32])
def test_ill_conditioned_inverses_keep_float32_precision(n):
    weight = with_condition(n, 1e6).float()
    exact = torch.linalg.inv(weight.double())
    inverses = lu(weight)[1], torch.inverse(weight)
    ours, theirs = ((inverse - exact).abs().max() / exact.abs().max() for inverse in inverses)
    assert ours <= torch.finfo(torch.float32).eps
    assert ours * 1000 < theirs


@pytest.mark.parametrize("function", [lu, reference.lu])
@pytest.mark.parametrize("n", [1, 3, 70])
def test_singular_matrices(function, n):
    weight = matrices((2, n, n))
    weight[0, :, -1] = 0
    log_abs_det, inverse = function(weight)
    assert log_abs_det[0] == -math.inf and math.isfinite(log_abs_det[1])
    assert inverse[0].isnan().all() and inverse[1].isfinite().all()


@pytest.mark.parametrize("position", [(0, 0), (2, 0), (1, 2), (2, 2)])
def test_not_a_number_is_seen(position):
    weight = matrices((1, 3, 3))
    weight[0][position] = math.nan
    log_abs_det, inverse = lu(weight)
    assert log_abs_det.isnan().all() and inverse.isnan().any()
    weight[0, :, 0] = torch.tensor([0.0, 0.0, math.nan])
    assert lu(weight)[0].isnan().all()


def test_determinants_beyond_the_range_of_float32():
    weight = 1e-30 * torch.eye(8)
    log_abs_det, inverse = lu(weight)
    torch.testing.assert_close(log_abs_det, torch.tensor(8 * math.log(1e-30)))
    torch.testing.assert_close(inverse, 1e30 * torch.eye(8))


@pytest.mark.parametrize("function", [lu, reference.lu, torch.ops.hflow_fast.lu_fwd])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"lu: weight must have shape \(C, C\) or \(N, C, C\), got \(3,\)"),
        (torch.zeros(2, 3), r"lu: weight must have shape \(C, C\) or \(N, C, C\), got \(2, 3\)"),
        (torch.zeros(2, 2, 3, 3), r"lu: weight must have shape \(C, C\) or \(N, C, C\), got \(2, 2, 3, 3\)"),
        (torch.zeros(3, 3).int(), "lu: weight must be float32, .* got"),
    ],
)
def test_bad_input_is_named(function, weight, message):
    with pytest.raises(ValueError, match=message):
        function(weight)
