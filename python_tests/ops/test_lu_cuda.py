"""lu_many's CUDA kernel through torch: what the rows of the table do not ask."""

from __future__ import annotations

import math

import pytest
import torch

from hflow_fast.ops import lu, lu_many

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda
A128 = [(4, 3, 3), (8, 4, 4), (8, 8, 8), (8, 8, 8)]


def stacks(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to("cuda", dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_many_stacks_are_exact_up_to_one_rounding(dtype):
    weights = [weight.mT for weight in stacks([*A128, (0, 5, 5), (2, 24, 24), (64, 64), (3, 33, 33)], dtype)]
    eps = 1e-10 if dtype == torch.float64 else torch.finfo(torch.float32).eps
    for weight, (log_abs_det, inverse) in zip(weights, lu_many(weights), strict=True):
        exact = weight.double().cpu()
        torch.testing.assert_close(log_abs_det.double().cpu(), torch.linalg.slogdet(exact)[1], rtol=eps, atol=eps)
        scale = torch.linalg.inv(exact).abs().amax((-2, -1), keepdim=True)
        torch.testing.assert_close(inverse.double().cpu() / scale, torch.linalg.inv(exact) / scale, rtol=eps, atol=eps)
        for many, alone in zip((log_abs_det, inverse), lu(weight), strict=True):
            assert torch.equal(many, alone)


def test_singular_and_not_finite_matrices_among_others():
    weight = torch.eye(4, device="cuda").repeat(4, 1, 1)
    weight[1, 2] = 0
    weight[2, 0, 3] = math.nan
    log_abs_det, inverse = lu(weight)
    torch.testing.assert_close(
        log_abs_det.cpu(), torch.tensor([0, -math.inf, math.nan, 0]), rtol=0, atol=0, equal_nan=True
    )
    assert inverse.isnan().flatten(1).all(1).tolist() == [False, True, True, False]


def test_one_launch_for_all_stacks_of_a_model():
    weights = stacks(A128)
    lu_many(weights)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        lu_many(weights)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and "lu_kernel" in kernels[0]


def test_stacks_on_two_devices_are_named():
    with pytest.raises(ValueError, match="lu_many: weights must be on one device"):
        lu_many([torch.eye(3, device="cuda"), torch.eye(3)])
