"""Calls every kernel with arguments that nobody should pass. A program of its own, since what it looks for is a crash:

    python -m ops._fuzz DRAWS FILE    (in python_tests; FILE holds the call that is being made)

Prints what was neither a result nor an exception that names the operation.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ._table import ROWS, kernel_calls

INTEGERS = st.one_of(
    st.integers(-2, 9), st.sampled_from([2**31 - 1, 2**31, -(2**31) - 1, 2**62, 2**63 - 1, -(2**63)])
)
FLOATS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.0, 1e-300, 1e300, -1e300, math.inf, -math.inf, math.nan])
DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64,
    torch.float8_e4m3fn,
]  # fmt: skip
FORMS = [
    "plain", "transposed", "strided", "expanded", "overlapping", "conjugate", "offset", "gradient", "meta", "sparse",
]  # fmt: skip
SIZES = st.one_of(st.integers(0, 5), st.sampled_from([1, 8, 17, 64, 65]))
SHAPES = st.one_of(
    st.lists(SIZES, max_size=6).map(tuple).filter(lambda shape: math.prod(shape) <= 2**16),
    st.sampled_from([(0, 2**40), (2**40, 0), (0, 3, 2**40, 4), (1, 0, 2**31), (0, 2**33, 1, 1)]),
)


@st.composite
def tensors(draw: st.DrawFn, like: torch.Tensor) -> torch.Tensor:
    """Any tensor, or one that differs from ``like`` in one respect."""
    shape, dtype, form = tuple(like.shape), like.dtype, "plain"
    change = draw(st.sampled_from(["everything", "shape", "dtype", "form", "values", "size"]))
    if change in ("everything", "shape"):
        shape = draw(SHAPES)
    if change == "size" and shape:
        place = draw(st.integers(0, len(shape) - 1))
        shape = shape[:place] + (draw(st.integers(0, 9)),) + shape[place + 1 :]
    if change in ("everything", "dtype"):
        dtype = draw(st.sampled_from(DTYPES))
    if change in ("everything", "form"):
        form = draw(st.sampled_from(FORMS))
    return shaped(shape, dtype, form, draw(FLOATS) if change == "values" else 1.0)


def shaped(shape: tuple[int, ...], dtype: torch.dtype, form: str, value: float) -> torch.Tensor:
    numel = math.prod(shape)
    if form == "expanded":
        return torch.ones((), dtype=torch.float32).to(dtype).expand(shape)
    if form == "overlapping" and numel:
        return torch.ones(numel + 1).to(dtype).as_strided(shape, (1,) * len(shape))
    if form == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    result = torch.full(shape, value if dtype.is_floating_point else 1.0, dtype=torch.float64).to(dtype)
    if form == "transposed" and len(shape) > 1:
        return result.transpose(0, -1).contiguous().transpose(0, -1)
    if form == "strided" and numel:
        return torch.stack([result, result], -1)[..., 0]
    if form == "conjugate":
        return result.conj() if dtype.is_complex else torch._neg_view(result) if dtype.is_signed else result
    if form == "offset" and numel:
        return torch.cat([result.new_zeros(1), result.flatten()])[1:].view(shape)
    if form == "gradient" and (dtype.is_floating_point or dtype.is_complex):
        return result.requires_grad_()
    if form == "sparse" and numel and dtype != torch.float8_e4m3fn:
        return result.to_sparse()
    return result


@st.composite
def arguments(draw: st.DrawFn, valid: tuple[Any, ...]) -> tuple[Any, ...]:
    """A valid call with some arguments replaced; a tensor may also come in place of another."""
    result = list(valid)
    everything = [t for argument in valid for t in (argument if isinstance(argument, list) else [argument])]
    spares = st.sampled_from([t for t in everything if isinstance(t, torch.Tensor)])
    for place in draw(st.sets(st.integers(0, len(valid) - 1), min_size=1, max_size=3)):
        match valid[place]:
            case bool():
                result[place] = draw(st.booleans())
            case int():
                result[place] = draw(INTEGERS)
            case float():
                result[place] = draw(FLOATS)
            case torch.Tensor() as tensor:
                result[place] = draw(st.one_of(tensors(tensor), spares))
            case list():
                result[place] = draw(st.lists(st.one_of(spares.flatmap(tensors), spares), min_size=1, max_size=5))
    return tuple(result)


def described(argument: Any) -> str:
    if isinstance(argument, list):
        return f"[{', '.join(map(described, argument))}]"
    if not isinstance(argument, torch.Tensor):
        return repr(argument)
    strides = tuple(argument.stride()) if argument.layout == torch.strided else argument.layout
    return f"<{argument.dtype} {tuple(argument.shape)} {strides} {argument.device}>"


def problem(op: torch._ops.OpOverload, called: tuple[Any, ...]) -> str | None:
    """What is wrong with how the call ends, if anything."""
    name = op._schema.name.removeprefix("hflow_fast::").rpartition("_")[0]
    try:
        outputs = op(*called)
        outputs = torch.utils._pytree.tree_leaves(outputs)
        if op._schema.name.endswith("_fwd") and any(output.requires_grad for output in outputs):
            sum(output.float().sum() for output in outputs).backward()
    except ValueError as error:
        if not str(error).startswith(f"hflow_fast.{name}: "):
            return f"ValueError: {error}"
    except (MemoryError, RuntimeError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            return f"{type(error).__name__}: {error}"
    return None


def fuzz(row: Any, draws: int, file: Path) -> list[str]:
    valid = [
        (op, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, called))
        for call in row.examples[:4]
        for op, called in kernel_calls(row.function(call), row.inputs(call))
    ]
    problems = []

    @settings(
        max_examples=draws,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(valid) - 1), st.data())
    def check(which: int, data: st.DataObject) -> None:
        op, called = valid[which]
        called = data.draw(arguments(called))
        text = f"{op}({', '.join(map(described, called))})"
        file.write_text(text)
        found = problem(op, called)
        if found is not None:
            problems.append(f"{text}\n    {found}")

    check()
    return problems


if __name__ == "__main__":
    found = [text for row in ROWS for text in fuzz(row, int(sys.argv[1]), Path(sys.argv[2]))]
    print("\n".join(found))
    sys.exit(bool(found))
