"""Every operation, one row: what it takes, and what it promises. Tests of promises that all make run over ROWS.

A new operation adds its row; test_table.py fails until it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from torch.utils._python_dispatch import TorchDispatchMode

from hflow_fast import ops, reference
from hflow_fast.ops import CouplingSpec

from ._cases import Function, coupling_cases, laid_out, run

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """The shapes of an operation's tensors, and its options."""

    shapes: tuple[Shape, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One operation.

    Args:
        name: In :mod:`hflow_fast.ops` and in :mod:`hflow_fast.reference`.
        tensors: The names of its tensor arguments, the flow variable first; "raw" and "residual" are outputs of networks, the others
            parameters. All are differentiable.
        examples: Small, with every option that changes what is computed.
        edges: Empty tensors, and tensors of one element.
        large: Work for several threads; the first is the first example in larger.
        calls: Anything that the operation takes.
        draws: How many of ``calls`` are tried.
        twice: It has second derivatives.
        undoes: ``inverse=True`` undoes the function of the same other arguments; it returns a log-det.
        in_networks: It follows a network's precision under autocast; flow variables stay float32.
        mapped: It works under vmap.
        adapted: Makes a function of separate tensors of one that takes a list of them.
        values: Of a tensor, from standard normal ones.
        huge: At least 2³¹ elements of x.
    """

    name: str
    tensors: tuple[str, ...]
    examples: tuple[Call, ...]
    edges: tuple[Call, ...]
    large: tuple[Call, ...]
    calls: st.SearchStrategy[Call]
    draws: int = 60
    twice: bool = False
    undoes: bool = False
    in_networks: bool = False
    mapped: bool = True
    adapted: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    values: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    huge: Call | None = None

    def function(self, call: Call) -> Function:
        """The operation with the call's options; a tuple of outputs."""
        return _bound(self.adapted(getattr(ops, self.name)), call)

    def reference(self, call: Call) -> Function:
        return _bound(self.adapted(getattr(reference, self.name)), call)

    def inputs(
        self,
        call: Call,
        dtype: torch.dtype = torch.float64,
        memory: str = "contiguous",
        *,
        other_memory: str | None = None,
        device: str = "cpu",
        raw_dtype: torch.dtype | None = None,
        parameter_dtype: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        """Trained-like values in one of LAYOUTS; layout and dtypes of all but x can be set apart."""
        generator, result = torch.Generator().manual_seed(0), []
        for place, (name, shape) in enumerate(zip(self.tensors, call.shapes, strict=True)):
            values = torch.randn(shape, dtype=torch.float64, generator=generator)
            values = self.values.get(name, lambda t: t)(values)
            own = (raw_dtype if name in ("raw", "residual") else parameter_dtype) if place else None
            result.append(laid_out(values.to(device, own or dtype), (place and other_memory) or memory))
        return result


def _bound(function: Callable[..., Any], call: Call) -> Function:
    def bound(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = function(*tensors, **call.options)
        return result if isinstance(result, tuple) else (result,)

    return bound


def _images(channels: st.SearchStrategy[int], largest: int = 33) -> st.SearchStrategy[Shape]:
    """Shapes (B, C), (B, C, L) and (B, C, H, W). Sizes fall on both sides of vectors (16) and tiles (to 4096)."""
    batch, side = st.integers(1, 3), st.integers(1, largest)
    return st.one_of(
        st.tuples(st.integers(1, 70), channels),
        st.tuples(batch, channels, st.integers(1, 20 * largest)),
        st.tuples(batch, channels, side, side),
    )


_EDGES = ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 3), (2, 1), (1, 1, 1, 1), (1, 2, 1, 1))
_BOTH = (False, True)


# ---- actnorm ----


def _actnorm(shape: Shape, **options: Any) -> Call:
    return Call((shape, shape[1:2], shape[1:2]), options)


_ACTNORM = Row(
    "actnorm",
    ("x", "log_scale", "bias"),
    examples=tuple(
        _actnorm(shape, inverse=inverse) for inverse in _BOTH for shape in ((2, 3, 4, 2), (2, 3), (2, 2, 3))
    ),
    edges=tuple(_actnorm(shape, inverse=inverse) for shape in _EDGES for inverse in _BOTH),
    large=tuple(_actnorm((3, 5, 150, 100), inverse=inverse) for inverse in _BOTH),
    calls=st.builds(_actnorm, _images(st.integers(1, 40)), inverse=st.booleans()),
    undoes=True,
    huge=_actnorm((33, 4, 4096, 4096)),
)


# ---- conv1x1 and lu ----


def _conv1x1(shape: Shape) -> Call:
    return Call((shape, (shape[1], shape[1]), shape[1:2]))


_CONV1X1 = Row(
    "conv1x1",
    ("x", "weight", "bias"),
    examples=tuple(map(_conv1x1, ((2, 3, 2, 2), (2, 3), (2, 2, 3), (2, 14, 2, 2), (2, 34, 1, 1)))),
    edges=tuple(map(_conv1x1, (*_EDGES, (0, 40, 4, 4), (2, 40, 0)))),
    large=tuple(map(_conv1x1, ((3, 5, 150, 100), (3, 12, 90, 90)))),
    calls=st.builds(_conv1x1, _images(st.one_of(st.integers(1, 9), st.sampled_from([12, 13, 24, 32, 33, 40])))),
    huge=_conv1x1((33, 4, 4096, 4096)),
)


def _well_conditioned(values: torch.Tensor) -> torch.Tensor:
    """Near a multiple of the identity, so that only rounding is left to see."""
    n = values.shape[-1]
    return 0.5 * values / max(1, n) ** 0.5 + 2 * torch.eye(n, dtype=values.dtype)


_STACKS = st.tuples(
    st.one_of(st.just(()), st.tuples(st.integers(0, 5))), st.one_of(st.integers(0, 20), st.sampled_from([64, 65]))
)

_LU = Row(
    "lu",
    ("weight",),
    examples=(Call(((2, 3, 3),)), Call(((3, 3),)), Call(((2, 1, 1),)), Call(((1, 66, 66),))),
    edges=tuple(Call((shape,)) for shape in ((0, 3, 3), (2, 0, 0), (0, 0), (1, 1))),
    large=(Call(((40, 16, 16),)),),
    calls=st.builds(lambda stack: Call(((*stack[0], stack[1], stack[1]),)), _STACKS),
    draws=30,
    twice=True,
    values={"weight": _well_conditioned},
)

_LU_MANY = Row(
    "lu_many",
    ("weight",) * 3,
    examples=(Call(((2, 3, 3), (4, 4), (1, 1, 1))), Call(((2, 3, 3), (1, 66, 66), (2, 2)))),
    edges=(Call(((0, 3, 3), (0, 0), (1, 1))), Call(((2, 0, 0), (2, 2), (0, 1, 1)))),
    large=(Call(((40, 16, 16), (30, 3, 3), (20, 8, 8))),),
    calls=st.builds(lambda *stacks: Call(tuple((*batch, n, n) for batch, n in stacks)), *[_STACKS] * 3),
    draws=30,
    twice=True,
    mapped=False,
    adapted=lambda function: lambda *weights: sum(function(weights), ()),
    values={"weight": _well_conditioned},
)


# ---- coupling and flow_step ----


def _coupling(shape: Shape, spec: CouplingSpec = CouplingSpec(), *, whole: bool = True, **options: Any) -> Call:
    channels = shape[1] if whole else spec.active_channels(shape[1])
    return Call((shape, (shape[0], spec.raw_channels(channels), *shape[2:])), {"spec": spec, **options})


def _flow_step(shape: Shape, spec: CouplingSpec = CouplingSpec(), **options: Any) -> Call:
    call = _coupling(shape, spec, **options)
    return Call((*call.shapes, (shape[1], shape[1]), shape[1:2]), call.options)


_HFLOW = CouplingSpec("exp_clip", shift_clamp=5.0, active="checkerboard", block=2)
_GLOW = CouplingSpec("sigmoid", active="channels", form="add_scale", layout="interleaved")
_COUPLING_EXAMPLES = (
    ((2, 3, 4, 4), _HFLOW, True, False),
    ((2, 3, 4, 4), _HFLOW, True, True),
    ((2, 3), CouplingSpec("exp_tanh", active="channels_ceil", shift_first=True), True, False),
    ((2, 3, 2), CouplingSpec("atan", active="channels", form="subtract_scale"), False, True),
    ((2, 4, 2, 2), CouplingSpec("none", active="rows"), True, False),
)

_COUPLING = Row(
    "coupling",
    ("x", "raw"),
    examples=tuple(_coupling(shape, s, whole=w, inverse=i) for shape, s, w, i in _COUPLING_EXAMPLES),
    edges=tuple(
        _coupling(shape, CouplingSpec("exp_clip", active=active), whole=whole)
        for shape in _EDGES
        for active in ("all", "channels", "channels_ceil")
        for whole in (True, False)
    ),
    large=tuple(_coupling(shape, _HFLOW, inverse=False) for shape in ((3, 4, 90, 70), (300, 6, 3, 3)))
    + (_coupling((30000, 3), CouplingSpec("exp_clip", active="channels"), inverse=True),),
    calls=st.builds(
        lambda case, inverse: Call(
            (case[1], (case[1][0], case[2], *case[1][2:])), {"spec": case[0], "inverse": inverse}
        ),
        coupling_cases(),
        st.booleans(),
    ),
    draws=250,
    undoes=True,
    values={"raw": lambda t: 1.5 * t},
    huge=_coupling((33, 4, 4096, 4096), CouplingSpec("none", active="channels"), whole=False),
)

_FLOW_STEP = Row(
    "flow_step",
    ("x", "raw", "weight", "bias"),
    examples=tuple(_flow_step(shape, s, whole=w, inverse=i) for shape, s, w, i in _COUPLING_EXAMPLES)
    + (_flow_step((1, 33, 1, 2), _GLOW),),
    edges=tuple(_flow_step(shape) for shape in (*_EDGES, (0, 40, 2, 2), (2, 40, 0))),
    large=tuple(_flow_step(shape, _HFLOW, inverse=False) for shape in ((3, 4, 90, 70), (300, 6, 3, 3)))
    + (_flow_step((30000, 3), CouplingSpec("exp_clip", active="channels"), inverse=True),),
    calls=st.builds(
        lambda case, inverse: Call(
            (case[1], (case[1][0], case[2], *case[1][2:]), (case[1][1], case[1][1]), case[1][1:2]),
            {"spec": case[0], "inverse": inverse},
        ),
        coupling_cases(st.one_of(st.integers(1, 9), st.sampled_from([12, 16, 32, 33, 40]))),
        st.booleans(),
    ),
    draws=200,
    values={"raw": lambda t: 1.5 * t},
    huge=_flow_step((33, 4, 4096, 4096), CouplingSpec("none", active="channels"), whole=False),
)


# ---- haar ----


def _haar(shape: Shape, **options: Any) -> Call:
    return Call((shape,), options)


@st.composite
def _haar_calls(draw: st.DrawFn) -> Call:
    dimensions = draw(st.integers(1, 3))
    levels = draw(st.integers(1, {1: 4, 2: 3, 3: 2}[dimensions]))
    sizes = [draw(st.integers(1, 12 // dimensions)) for _ in range(dimensions)]
    batch, channels, inverse = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.booleans())
    if inverse:
        channels *= 2 ** (levels * dimensions)
    else:
        sizes = [size * 2**levels for size in sizes]
    return _haar(
        (batch, channels, *sizes),
        levels=levels,
        inverse=inverse,
        order=draw(st.sampled_from(["colour", "wavelet"])),
        rebalance=draw(st.sampled_from([1.0, 1.7])),
        mean=draw(st.booleans()),
    )


_ALL_OF_HAAR = {"order": "wavelet", "rebalance": 1.5, "mean": True}
_HAAR = Row(
    "haar",
    ("x",),
    examples=(
        _haar((2, 4, 4, 6)),
        _haar((2, 16, 4, 4), levels=2, **_ALL_OF_HAAR),
        _haar((2, 16, 1, 2), levels=2, inverse=True, **_ALL_OF_HAAR),
        _haar((2, 4, 2, 2), inverse=True),
        _haar((2, 1, 4), **_ALL_OF_HAAR),
        _haar((1, 8, 2, 2, 2), rebalance=0.8),
    ),
    edges=tuple(map(_haar, ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (1, 1, 2), (1, 1, 2, 2, 2), (0, 1, 0)))),
    large=(_haar((3, 4, 128, 160)), _haar((3, 4, 128, 160), inverse=True)),
    calls=_haar_calls(),
    draws=80,
    twice=True,
    undoes=True,
    huge=_haar((33, 4, 4096, 4096)),
)


# ---- in networks ----


def _alone(shape: Shape, **options: Any) -> Call:
    return Call((shape,), options)


def _bias_act(shape: Shape, **options: Any) -> Call:
    return Call((shape, shape[1:2], shape), options)


_BIAS_ACT = Row(
    "bias_act",
    ("x", "bias", "residual"),
    examples=(
        _bias_act((2, 3, 4, 2), activation="leaky_relu", slope=0.1, gain=0.7),
        _bias_act((2, 3), activation="tanh"),
        _bias_act((2, 2, 3), gain=0.7),
    ),
    edges=tuple(_bias_act(shape, activation="leaky_relu") for shape in _EDGES),
    large=(_bias_act((3, 5, 150, 100), activation="leaky_relu", slope=0.1, gain=0.7),),
    calls=st.builds(
        _bias_act,
        _images(st.integers(1, 40)),
        activation=st.sampled_from(["linear", "leaky_relu", "tanh"]),
        slope=st.sampled_from([0.0, 0.1]),
        gain=st.sampled_from([1.0, 0.5**0.5]),
    ),
    draws=100,
    in_networks=True,
    huge=_bias_act((33, 4, 4096, 4096), activation="leaky_relu"),
)

_INSTANCE_NORM = Row(
    "instance_norm",
    ("x",),
    examples=tuple(map(_alone, ((2, 3, 4, 2), (2, 3), (2, 2, 3), (2, 3, 1, 1)))),
    edges=tuple(map(_alone, ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 3), (2, 0), (1, 1, 1, 2), (1, 2)))),
    large=(_alone((3, 70, 50, 30)),),
    calls=st.builds(
        _alone,
        # Over a few values that lie close together the gradient cancels, and only rounding is left to compare.
        st.one_of(
            st.tuples(st.integers(1, 5), st.integers(8, 200)),
            st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(8, 200)),
            st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(8, 33), st.integers(1, 33)),
            st.tuples(st.integers(1, 3), st.integers(60, 140), st.integers(2, 9), st.integers(4, 9)),
            st.tuples(st.integers(1, 3), st.integers(8, 40), st.just(1), st.just(1)),
        ),
        epsilon=st.sampled_from([1e-6, 0.3]),
    ),
    draws=100,
    in_networks=True,
    huge=_alone((33, 4, 4096, 4096)),
)


@st.composite
def _resample_calls(draw: st.DrawFn) -> Call:
    up = draw(st.booleans())
    size = st.one_of(st.integers(1, 12), st.integers(20, 40)).map(lambda n: n + 1 if up else 2 * n)
    return _alone((draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(size), draw(size)), up=up)


_RESAMPLE = Row(
    "resample",
    ("x",),
    examples=tuple(_alone(shape, up=up) for up in _BOTH for shape in ((2, 3, 4, 6), (1, 2, 2, 2))),
    edges=tuple(_alone(shape, up=up) for up in _BOTH for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (1, 1, 2, 2))),
    large=tuple(_alone((3, 5, 150, 100), up=up) for up in _BOTH),
    calls=_resample_calls(),
    draws=80,
    twice=True,
    in_networks=True,
    huge=_alone((33, 4, 4096, 4096)),
)


ROWS = (
    _ACTNORM, _BIAS_ACT, _CONV1X1, _COUPLING, _FLOW_STEP, _HAAR, _INSTANCE_NORM, _LU, _LU_MANY, _RESAMPLE,
)  # fmt: skip
DEVICES = ("cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []))

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_device = pytest.mark.parametrize("device", DEVICES)


def every_example(rows: Sequence[Row] = ROWS) -> pytest.MarkDecorator:
    """Parametrizes over (row, call) for all examples."""
    return pytest.mark.parametrize(
        ("row", "call"),
        [pytest.param(row, call, id=f"{row.name}{place}") for row in rows for place, call in enumerate(row.examples)],
    )



def kernel_calls(function: Function, tensors: Sequence[torch.Tensor]) -> list[tuple[torch._ops.OpOverload, tuple]]:
    """The kernels of ours, and their arguments, that run when the function's outputs and gradients are computed."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            if op.namespace == "hflow_fast":
                calls.append((op, arguments))
            return op(*arguments, **(options or {}))

    with Record():
        run(function, tensors)
    return calls
