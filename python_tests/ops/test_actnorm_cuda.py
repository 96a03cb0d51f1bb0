"""actnorm's CUDA kernel through torch: accuracy, streams, graphs, devices."""

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


@pytest.mark.parametrize("offset", [0, 1])
def test_storage_that_starts_anywhere(offset):
    memory = torch.randn(2 * 3 * 64 + offset, device="cuda")
    x = memory[offset:].view(2, 3, 8, 8)
    log_scale, bias = torch.randn(2, 3, device="cuda")
    torch.testing.assert_close(actnorm(x, log_scale, bias), reference.actnorm(x, log_scale, bias))


def test_same_bits_in_every_run():
    arguments = [t.cuda() for t in inputs((8, 6, 200, 100), memory="channels_last")]
    first, second = (outputs_and_gradients(actnorm, *arguments, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_runs_on_the_current_stream():
    x, log_scale, bias, *_ = (t.cuda() for t in inputs((4, 3, 64, 64)))
    expected = actnorm(x + 1, log_scale, bias)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would overtake the addition
        y = actnorm(x + 1, log_scale, bias)[0]
    stream.synchronize()
    assert torch.equal(y, expected)


def test_captured_in_a_graph():
    arguments = [t.cuda() for t in inputs((4, 3, 32, 32))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs_and_gradients(actnorm, *arguments, False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_and_gradients(actnorm, *arguments, False)
    arguments[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    expected = outputs_and_gradients(actnorm, *arguments, False)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(memory):
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB of device memory")
    layout = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    x = torch.ones(33, 4, 4096, 4096, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    log_scale, bias = torch.zeros(4, device="cuda"), torch.arange(4.0, device="cuda")
    y, log_det = actnorm(x, log_scale, bias)
    assert torch.equal(y[-1, :, -1, -1].float(), 1 + bias)
    assert torch.equal(y[0, :, 0, 0].float(), 1 + bias)
    assert y[-1].float().mean() == 2.5
    assert log_det.abs().max() == 0


def test_opcheck():
    x, log_scale, bias, grad_y, grad_log_det = (t.cuda() for t in inputs((2, 3, 4, 5)))
    leaves = [t.requires_grad_() for t in (x, log_scale, bias)]
    torch.library.opcheck(torch.ops.hflow_fast.actnorm_fwd.default, (*leaves, False))
    tensors = [t.detach() for t in (*leaves, grad_y, grad_log_det)]
    torch.library.opcheck(torch.ops.hflow_fast.actnorm_bwd.default, (*tensors, True))


def test_another_device_is_named():
    with pytest.raises(ValueError, match="actnorm: bias must be on the device of x"):
        actnorm(torch.zeros(2, 3, device="cuda"), torch.zeros(3, device="cuda"), torch.zeros(3))
