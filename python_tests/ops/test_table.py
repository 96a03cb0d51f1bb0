"""Values and gradients of every operation: accuracy, layouts, edges, NaN, round trips."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast._extension import _INNER_OPS

from ._cases import DTYPES, LAYOUTS, assert_accurate, atol_of, log_det_of_jacobian, run
from ._table import ROWS, Call, every_device, every_example, every_row

UNDONE = [row for row in ROWS if row.undoes]


def test_every_operation_has_a_row():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hflow_fast::")}
    operations = {name[len("hflow_fast::") : -len("_fwd")] for name in names if "_fwd" in name}
    assert {row.name for row in ROWS} == operations - set(_INNER_OPS)


@every_device
@every_row
def test_matches_float64(row, device):
    @settings(max_examples=row.draws, deadline=None, derandomize=True)
    @given(
        row.calls,
        st.sampled_from(DTYPES),
        st.fixed_dictionaries(
            {
                "memory": st.sampled_from(LAYOUTS),
                "other_memory": st.sampled_from(LAYOUTS),
                "raw_dtype": st.sampled_from([None, torch.bfloat16]),
                "parameter_dtype": st.sampled_from([None, torch.float32]),
            }
        ),
    )
    def check(call, dtype, options):
        tensors = row.inputs(call, dtype, device=device, **options)
        assert_accurate(row.function(call), row.reference(call), tensors, atol_of(*tensors))

    check()


@every_device
@every_example()
def test_layouts_change_nothing_but_the_layout(row, call, device):
    for memory in LAYOUTS:
        tensors = row.inputs(call, memory=memory, device=device)
        plain = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        for ours, expected in zip(run(row.function(call), tensors), run(row.function(call), plain), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{memory}: {text}")
        y = row.function(call)(*tensors)[0]
        native = torch.channels_last if memory == "channels_last" and y.dim() == 4 else torch.contiguous_format
        assert y.is_contiguous(memory_format=native), memory


@every_device
@every_row
def test_empty_and_single(row, device):
    for call in row.edges:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = row.inputs(call, dtype, device=device)
            results = zip(run(row.function(call), tensors), run(row.reference(call), tensors), strict=True)
            for ours, theirs in results:
                torch.testing.assert_close(ours, theirs, msg=lambda text: f"{call}: {text}")


@every_device
@every_example()
def test_not_a_number_and_infinity_propagate(row, call, device):
    for place in range(len(row.tensors)):
        for value in (math.nan, math.inf, -math.inf):
            tensors = row.inputs(call, device=device)
            tensors[place].view(-1)[-1] = value
            results = zip(row.function(call)(*tensors), row.reference(call)(*tensors), strict=True)
            for ours, theirs in results:
                torch.testing.assert_close(
                    ours,
                    theirs,
                    rtol=1e-10,
                    atol=1e-10,
                    equal_nan=True,
                    msg=lambda text: f"{value} in {row.tensors[place]}: {text}",
                )


@every_device
@every_example(UNDONE)
def test_round_trip_and_log_det(row, call, device):
    x, *others = row.inputs(call, device=device)
    y, log_det = row.function(call)(x, *others)
    opposite = Call(call.shapes, call.options | {"inverse": not call.options.get("inverse", False)})
    again, inverse_log_det = row.function(opposite)(y, *others)
    torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-12, atol=1e-12)
    for b in range(len(x)):
        sample = [t[b : b + 1] if name == "raw" else t for name, t in zip(row.tensors[1:], others, strict=True)]
        jacobian = log_det_of_jacobian(lambda t: row.function(call)(t, *sample)[0], x[b : b + 1])
        torch.testing.assert_close(log_det[b : b + 1], jacobian, rtol=1e-10, atol=1e-10)
