"""actnorm's CUDA kernel through torch, on the shapes at which it changes its ways."""

from __future__ import annotations

import pytest
import torch

from hflow_fast import reference
from hflow_fast._extension import has_kernel
from hflow_fast.ops import actnorm

from ._cases import DTYPES, MEMORY, tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda
SHAPES = [
    (4, 3, 128, 128),
    (2, 5, 7, 9),
    (3, 508, 1, 1),
    (5, 33),
    (2, 4, 1000),
    (2, 1030, 3, 3),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
]


def inputs(shape, dtype=torch.float32, memory="contiguous", parameter_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = tensor(shape, dtype, memory, generator)
    log_scale, bias = (0.3 * tensor((shape[1],), parameter_dtype, memory, generator) for _ in range(2))
    return x, log_scale, bias, tensor(shape, dtype, memory, generator), torch.randn(shape[0], generator=generator)


def outputs_and_gradients(function, x, log_scale, bias, grad_y, grad_log_det, inverse):
    leaves = [t.detach().requires_grad_() for t in (x, log_scale, bias)]
    y, log_det = function(*leaves, inverse=inverse)
    projection = grad_y.to(y.dtype), grad_log_det.to(log_det.dtype)
    return [y, log_det, *torch.autograd.grad((y, log_det), leaves, projection)]


def test_the_kernel_is_there():
    assert has_kernel("actnorm", torch.device("cuda"))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, memory, inverse):
    arguments = inputs(shape, dtype, memory, torch.float64 if dtype == torch.float64 else torch.float32)
    exact = outputs_and_gradients(reference.actnorm, *(t.double() for t in arguments), inverse)
    ours = outputs_and_gradients(actnorm, *(t.cuda() for t in arguments), inverse)
    count = max(1, arguments[0].numel() // shape[1])
    for number, (a, e) in enumerate(zip(ours, exact, strict=True)):
        eps = torch.finfo(a.dtype).eps
        terms = count**0.5 if number in (3, 4) else 1.0  # sums of independent rounding errors
        torch.testing.assert_close(a.detach().cpu().double(), e.detach(), rtol=8 * eps * terms, atol=8 * eps * terms)
