from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast import reference
from hflow_fast.ops import lu, lu_many

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


@pytest.mark.parametrize("function", [lu, reference.lu])
@pytest.mark.parametrize("n", [3, 8, 48])
def test_singular_matrices_that_rounding_hides(function, n):
    # The last column is the sum of the others: float64 leaves pivots of about 1e-16 instead of 0, and inverses of 1e16.
    weight = torch.randint(-5, 6, (50, n, n), generator=torch.Generator().manual_seed(0)).float()
    weight[..., -1] = weight[..., :-1].sum(-1)
    log_abs_det, inverse = function(weight)
    assert (log_abs_det == -math.inf).all() and inverse.isnan().all()
    weight[..., -1] += 1e-3 * torch.arange(1, n + 1)
    log_abs_det, inverse = function(weight)
    assert log_abs_det.isfinite().all() and inverse.isfinite().all()


@pytest.mark.parametrize("function", [lu, reference.lu])
def test_scaled_rows_and_columns_are_not_singular(function):
    scale = torch.logspace(-15, 15, 6, dtype=torch.float64)
    well_scaled = matrices((20, 6, 6)) + 3 * torch.eye(6, dtype=torch.float64)
    weight = scale[:, None] * well_scaled * scale.flip(0) ** 2
    log_abs_det, inverse = function(weight)
    torch.testing.assert_close(log_abs_det, torch.linalg.slogdet(well_scaled).logabsdet, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scale.flip(0)[:, None] ** 2 * inverse * scale, torch.linalg.inv(well_scaled))


@pytest.mark.parametrize("function", [lu, reference.lu])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [(0, 0), (2, 0), (1, 2), (2, 2)])
def test_numbers_that_are_not_finite_make_everything_nan(function, value, position):
    weight = matrices((2, 3, 3))
    weight[0][position] = value
    log_abs_det, inverse = function(weight)
    assert log_abs_det.isnan().tolist() == [True, False] and inverse[0].isnan().all() and inverse[1].isfinite().all()
    weight[0, :, 0] = torch.tensor([0.0, 0.0, value])
    assert function(weight)[0][0].isnan()


def test_determinants_beyond_the_range_of_float32():
    weight = 1e-30 * torch.eye(8)
    log_abs_det, inverse = lu(weight)
    torch.testing.assert_close(log_abs_det, torch.tensor(8 * math.log(1e-30)))
    torch.testing.assert_close(inverse, 1e30 * torch.eye(8))


STACKS = [(7, 3, 3), (2, 4, 4), (8, 8), (0, 5, 5), (3, 1, 1)]


@pytest.mark.parametrize("function", [lu_many, reference.lu_many])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_stacks_are_what_each_is_alone(function, dtype):
    weights = [matrices(shape, dtype, seed).mT for seed, shape in enumerate(STACKS)]
    weights.append(matrices((2, 3, 3)))  # each stack has its own dtype
    one_by_one = reference.lu if function is reference.lu_many else lu
    for many, alone in zip(function(weights), map(one_by_one, weights), strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(many, alone, strict=True))


def test_many_stacks_have_gradients():
    shapes = [(2, 3, 3), (2, 2), (1, 4, 4)]
    weights = [(matrices(shape) + 2 * torch.eye(shape[-1])).requires_grad_() for shape in shapes]

    def flat(*weights):
        return [tensor for pair in lu_many(weights) for tensor in pair]

    assert torch.autograd.gradcheck(flat, weights)
    assert torch.autograd.gradgradcheck(flat, weights)
    (grad,) = torch.autograd.grad(lu_many([weights[0], weights[1].detach()])[0][0].sum(), weights[0])
    torch.testing.assert_close(grad, torch.linalg.inv(weights[0]).mT)


def test_many_stacks_with_a_large_or_no_matrix():
    weights = [matrices((2, 3, 3)), matrices((1, 70, 70))]
    for (log_abs_det, inverse), weight in zip(lu_many(weights), weights, strict=True):
        torch.testing.assert_close(log_abs_det, torch.linalg.slogdet(weight).logabsdet)
        torch.testing.assert_close(inverse, torch.linalg.inv(weight))
    assert lu_many([]) == []


def test_many_stacks_opcheck_and_compile():
    weights = [matrices(shape, torch.float32).requires_grad_() for shape in STACKS]
    torch.library.opcheck(torch.ops.hflow_fast.lu_many_fwd.default, (weights,))
    compiled = torch.compile(lambda *w: [t for pair in lu_many(w) for t in pair], fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, weights), run(lambda *w: sum(lu_many(w), ()), weights), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("function", [lu_many, reference.lu_many, torch.ops.hflow_fast.lu_many_fwd])
def test_bad_stacks_are_named(function):
    with pytest.raises(ValueError, match=r"lu_many: weight must have shape \(C, C\) or \(N, C, C\), got \(2, 3\)"):
        function([torch.eye(3), torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="lu_many: weight must be float32, .* got"):
        function([torch.eye(3), torch.eye(3).int()])


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


@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_and_leaves_its_neighbours_alone(size: int, value: float) -> None:
    weight = torch.randn(3, size, size) + 10 * torch.eye(size)
    expected = lu(weight)
    weight[1, 2, 3] = value
    for actual, right in zip(lu(weight), expected):
        assert actual[1].isnan().all()
        torch.testing.assert_close(actual[::2], right[::2])


def test_stacks_of_large_matrices_on_several_threads() -> None:
    """Where torch's own batched factorisation goes wrong."""
    threads = torch.get_num_threads()
    weight = torch.linalg.qr(matrices((508, 508)))[0].repeat(9, 1, 1)
    torch.set_num_threads(2)
    try:
        log_det, inverse = lu(weight)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(log_det, torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse, weight.mT, rtol=0, atol=1e-10)
