"""Every operation inside the rest of torch: opcheck, torch.compile, autocast, vmap, several devices."""

from __future__ import annotations

import pytest
import torch

from ._cases import MEMORY, run
from ._table import ROWS, every_device, every_example, every_row, kernel_calls


def opcheck(row, call, memory, device, utilities):
    """torch.library.opcheck of the kernels behind a call and its gradients; how many there were."""
    calls = kernel_calls(row.function(call), row.inputs(call, torch.float32, memory, device=device))
    for op, arguments in calls:
        differentiable = op._schema.name.endswith("_fwd")
        copies = [a.detach().requires_grad_(differentiable) if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(op, tuple(copies), test_utils=utilities)
    return len(calls)


@every_device
@pytest.mark.parametrize("memory", MEMORY)
@every_row
def test_opcheck(row, memory, device):
    assert opcheck(row, row.examples[0], memory, device, "ALL") or device == "cuda"


@every_device
@pytest.mark.parametrize("memory", MEMORY)
@every_example()
def test_fake_outputs_are_like_real_ones(row, call, memory, device):
    opcheck(row, call, memory, device, ("test_schema", "test_faketensor"))


def assert_same(compiled, row, call, device):
    tensors = row.inputs(call, torch.float32, device=device)
    for ours, eager in zip(run(compiled, tensors), run(row.function(call), tensors), strict=True):
        torch.testing.assert_close(ours, eager)


@every_device
@pytest.mark.parametrize("dynamic", [False, True])
@every_row
def test_compiles_to_one_graph(row, dynamic, device):
    torch._dynamo.reset()
    function = row.function(row.examples[0])
    compiled = torch.compile(lambda *t: function(*t), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled, row, row.examples[0], device)
    assert_same(compiled, row, row.large[0], device)


@every_device
def test_inductor_compiles_to_one_graph(device):
    torch._dynamo.reset()
    (row,) = (row for row in ROWS if row.name == "flow_step")
    function = row.function(row.examples[0])
    compiled = torch.compile(lambda *t: function(*t), fullgraph=True)
    assert_same(compiled, row, row.examples[0], device)


@every_device
@every_example([row for row in ROWS if row.network])
def test_ops_of_networks_keep_their_precision_under_autocast(row, call, device):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = row.inputs(call, dtype, device=device)
        with torch.autocast(device, torch.bfloat16):
            outputs = row.function(call)(*tensors)
        for ours, expected in zip(outputs, row.function(call)(*tensors), strict=True):
            assert ours.dtype == dtype and torch.equal(ours, expected)


@every_device
@every_example([row for row in ROWS if not row.network])
def test_flow_variables_stay_float32_under_autocast(row, call, device):
    for raw_dtype in (torch.float32, torch.bfloat16):
        options = {"device": device, "raw_dtype": raw_dtype, "parameter_dtype": torch.float32}
        x, *others = row.inputs(call, torch.bfloat16, **options)
        with torch.autocast(device, torch.bfloat16):
            outputs = row.function(call)(x, *others)
        assert all(output.dtype == torch.float32 for output in outputs)
        for ours, expected in zip(outputs, row.function(call)(x.float(), *others), strict=True):
            torch.testing.assert_close(ours, expected)
        tensors = row.inputs(call, torch.float32, **options)
        with torch.autocast(device, torch.bfloat16):
            results = run(row.function(call), (x, *others)), run(row.function(call), tensors)
        assert [t.dtype for t in results[0][len(outputs) :]] == [t.dtype for t in (x, *others)]
        assert [t.dtype for t in results[1][len(outputs) :]] == [t.dtype for t in tensors]
        own = getattr(torch.ops.hflow_fast, f"{row.name}_fwd").default
        if own in (op for op, _ in kernel_calls(row.function(call), tensors)):  # torch's own backward would round
            for ours, expected in zip(results[1], run(row.function(call), tensors), strict=True):
                torch.testing.assert_close(ours, expected)


@every_device
@every_example()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop(row, call, device):
    x, *others = row.inputs(call, device=device)
    leaves = [torch.stack([t, 0.5 * t, 0 * t + t.flip(0)]).requires_grad_() for t in (x, *others)]
    mapped = torch.func.vmap(row.function(call))(*leaves)
    looped = [torch.stack(outputs) for outputs in zip(*(row.function(call)(*t) for t in zip(*leaves)))]
    for ours, expected in zip(mapped, looped, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for total in (mapped, looped):
        gradients = torch.autograd.grad(sum(output.square().sum() for output in total), leaves)
        if total is mapped:
            first = gradients
    for ours, expected in zip(first, gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@every_device
@every_row
def test_tensors_of_another_device_are_named(row, device):
    call, other = row.examples[0], "meta" if device == "cpu" else "cpu"
    for place, name in enumerate(row.tensors[1:], start=1):
        for function in (row.function(call), row.reference(call)):
            tensors = row.inputs(call, torch.float32, device=device)
            tensors[place] = tensors[place].to(other)
            expected = rf"hflow_fast.{row.name}: {name} must be on the device of x, {device}(:0)?, got {other}"
            with pytest.raises(ValueError, match=expected):
                function(*tensors)


@every_row
def test_sparse_and_quantized_tensors_are_named(row):
    call = row.examples[0]
    for place, name in enumerate(row.tensors):
        for function in (row.function(call), row.reference(call)):
            tensors = row.inputs(call, torch.float32)
            tensors[place] = tensors[place].to_sparse()
            with pytest.raises(ValueError, match=f"hflow_fast.{row.name}: {name} must be dense .*, got torch.sparse_coo"):
                function(*tensors)
            tensors = row.inputs(call, torch.float32)
            tensors[place] = torch.quantize_per_tensor(tensors[place], 0.1, 0, torch.qint8)
            with pytest.raises(ValueError, match=f"hflow_fast.{row.name}: {name} must be float32, .*, got torch.qint8"):
                function(*tensors)
