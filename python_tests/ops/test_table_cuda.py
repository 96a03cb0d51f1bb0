"""What only a GPU has, for every operation: streams, graphs."""

from __future__ import annotations

import pytest
import torch

from ._cases import run
from ._table import every_example, every_row

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda


@every_row
def test_runs_on_the_current_stream(row):
    call = row.large[0]
    x, *others = row.inputs(call, torch.float32, device="cuda")
    expected = run(row.function(call), (x * 2, *others))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would overtake the multiplication
        results = run(row.function(call), (x * 2, *others))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@every_example()
def test_captured_in_a_graph_and_replayed(row, call):
    tensors = [t.requires_grad_() for t in row.inputs(call, torch.float32, device="cuda")]
    function = row.function(call)
    projections = [torch.randn_like(output) for output in function(*tensors)]

    def step():
        outputs = function(*tensors)
        return [*outputs, *torch.autograd.grad(outputs, tensors, projections, materialize_grads=True)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors[0].mul_(1.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
