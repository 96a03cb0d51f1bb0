"""What is timed: one entry per operation in :data:`OPS`, on shapes that flows use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import ops
from .._extension import has_kernel
from . import plain

__all__ = ["OPS", "Case", "Op", "cases_of"]

Function = Callable[[], object]

HFLOW = ops.CouplingSpec("exp_clip", clamp=3.0, shift_clamp=5.0, active="checkerboard")
GLOW = ops.CouplingSpec("sigmoid", form="add_scale", active="channels")

SHAPES = {
    "HFlow": [
        (4, 3, 128, 128), (4, 4, 64, 64), (4, 8, 32, 32), (4, 8, 8, 8),  # the levels of A-128
        (16, 3, 128, 128), (16, 8, 32, 32),
        (4, 3, 256, 256), (4, 4, 128, 128), (16, 3, 256, 256),
    ],
    "Glow": [
        (64, 12, 32, 32), (64, 12, 16, 16), (64, 24, 16, 16), (64, 24, 8, 8),
        (64, 48, 4, 4), (64, 96, 8, 8), (64, 192, 4, 4),
    ],
    "large": [(16, 16, 256, 256)],  # 64 MiB
}  # fmt: skip
CHANNELS_LAST = {"HFlow": (16, 8, 32, 32), "Glow": (64, 24, 16, 16)}
# Inside networks: A-128's encoders, decoders and coupling networks at batch 4, and 64 MiB.
FEATURES = [(4, 64, 128, 128), (4, 64, 64, 64), (4, 256, 64, 64), (4, 512, 32, 32), (4, 512, 8, 8), (16, 64, 128, 128)]
FEATURES_CHANNELS_LAST = (4, 256, 64, 64)
MATRICES = [(28, 4, 4), (28, 8, 8), (16, 48, 48)]
A128_STACKS = [(4, 3, 3), (8, 4, 4), (8, 8, 8), (8, 8, 8)]  # the 28 small matrices of A-128


@dataclass(frozen=True)
class Input:
    """A shape and what else decides a case's tensors."""

    model: str
    shape: tuple[int, ...]
    channels_last: bool = False
    raw_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        marks = [self.model, "×".join(map(str, self.shape))]
        return " ".join([*filter(None, marks), *["channels_last"] * self.channels_last])

    @property
    def spec(self) -> ops.CouplingSpec:
        return HFLOW if self.model == "HFlow" else GLOW


@dataclass(frozen=True)
class Op:
    """How an operation is timed.

    ``tensors`` makes the differentiable arguments; ``call`` takes a module (``hflow_fast.ops`` or its plain torch twin,
    ``hflow_fast.bench.plain``), the tensors and the input, and calls the operation. ``kernels`` have to exist for it.
    """

    tensors: Callable[[Input, Random], list[Tensor]]
    call: Callable[[Any, list[Tensor], Input], Any]
    kernels: tuple[str, ...]
    inputs: Literal["images", "matrices", "stacks", "features"] = "images"
    models: tuple[str, ...] = ("",)
    """Of features: what ``call`` tells apart."""
    reads_raw: bool = False
    rereads: bool = True
    """Whether the backward pass needs the inputs (or as much of the outputs) again."""


class Random:
    """Standard normal tensors on a device, the same ones every time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.device)


def _x(given: Input, random: Random) -> Tensor:
    x = random(*given.shape)
    return x.contiguous(memory_format=torch.channels_last) if given.channels_last else x


def _x_and_raw(given: Input, random: Random) -> list[Tensor]:
    batch, channels, *pixels = given.shape
    raw = random(batch, given.spec.raw_channels(given.spec.active_channels(channels)), *pixels).to(given.raw_dtype)
    return [_x(given, random), raw.contiguous(memory_format=torch.channels_last) if given.channels_last else raw]


def _matrix(given: Input, random: Random) -> Tensor:
    """A rotation, near which 1 × 1 convolutions stay."""
    return torch.linalg.qr(random(given.shape[1], given.shape[1]))[0]


def _glow_step(module: Any, tensors: list[Tensor], given: Input) -> tuple[Tensor, Tensor]:
    """All of Glow between two networks: coupling, then the next step's actnorm and 1 × 1 convolution."""
    x, raw, log_scale, shift, matrix = tensors
    if module is not ops:
        u, log_det = module.coupling(x, raw, given.spec)
        v, log_det_actnorm = module.actnorm(u, log_scale, shift)
        return module.conv1x1(v, matrix), log_det + log_det_actnorm
    # Actnorm folds into the convolution.
    y, log_det = ops.flow_step(x, raw, matrix * log_scale.exp(), matrix @ shift, given.spec)
    return y, log_det + x.shape[2] * x.shape[3] * log_scale.sum()


OPS = {
    "actnorm": Op(
        lambda given, random: [_x(given, random), random(given.shape[1]), random(given.shape[1])],
        lambda module, tensors, given: module.actnorm(*tensors),
        kernels=("actnorm",),
    ),
    "conv1x1": Op(
        lambda given, random: [_x(given, random), _matrix(given, random), random(given.shape[1])],
        lambda module, tensors, given: module.conv1x1(*tensors),
        kernels=("conv1x1",),
    ),
    "lu": Op(
        lambda given, random: [random(*given.shape)],
        lambda module, tensors, given: module.lu(*tensors),
        kernels=("lu",),
        inputs="matrices",
    ),
    "lu_many": Op(
        lambda given, random: [random(*shape) for shape in A128_STACKS],
        lambda module, tensors, given: sum(module.lu_many(tensors), ()),
        kernels=("lu_many",),
        inputs="stacks",
    ),
    "coupling": Op(
        _x_and_raw,
        lambda module, tensors, given: module.coupling(*tensors, given.spec),
        kernels=("coupling",),
        reads_raw=True,
    ),
    "flow_step": Op(
        lambda given, random: [*_x_and_raw(given, random), _matrix(given, random), random(given.shape[1])],
        lambda module, tensors, given: module.flow_step(*tensors, given.spec),
        kernels=("flow_step",),
        reads_raw=True,
    ),
    "haar": Op(
        lambda given, random: [_x(given, random)],
        lambda module, tensors, given: module.haar(*tensors),
        kernels=("haar",),
        rereads=False,
    ),
    "resample": Op(
        lambda given, random: [_x(given, random)],
        lambda module, tensors, given: module.resample(*tensors, up=given.model == "up"),
        kernels=("resample",),
        inputs="features",
        models=("down", "up"),
        rereads=False,
    ),
    "instance_norm": Op(
        lambda given, random: [_x(given, random)],
        lambda module, tensors, given: module.instance_norm(*tensors),
        kernels=("instance_norm",),
        inputs="features",
    ),
    "bias_act": Op(
        lambda given, random: [_x(given, random), random(given.shape[1]), _x(given, random)],
        lambda module, tensors, given: module.bias_act(*tensors, activation="leaky_relu", gain=0.5**0.5),
        kernels=("bias_act",),
        inputs="features",
    ),
    "glow_step": Op(
        lambda given, random: [
            *_x_and_raw(given, random), random(given.shape[1]), random(given.shape[1]), _matrix(given, random)
        ],
        _glow_step,
        kernels=("flow_step", "coupling", "conv1x1"),
        reads_raw=True,
    ),
}  # fmt: skip
"""How each operation is timed."""


@dataclass(frozen=True)
class Case:
    """One line of the results: an operation on one input, forward or forward + backward, in any implementation."""

    op: str
    name: str
    work: Literal["forward", "forward + backward"]
    dtype: str
    bytes: int
    """That have to be read and written: every tensor once per pass."""
    implement: Callable[[Any, Callable[[Callable], Callable]], Function]

    def ours(self) -> Function:
        return self.implement(ops, _as_it_is)

    def eager(self) -> Function:
        """Plain torch."""
        return self.implement(plain, _as_it_is)

    def compiled(self) -> Function:
        """Plain torch through torch.compile; compiles when it is first called."""
        return self.implement(plain, partial(torch.compile, dynamic=False, fullgraph=True))


def _as_it_is(function: Callable) -> Callable:
    return function


def cases_of(
    selected: Sequence[str], device: torch.device, *, bf16_raw: bool = False, containing: str = ""
) -> Iterator[Case]:
    """The cases of the selected operations that have kernels on ``device``, those whose name holds ``containing``.

    ``bf16_raw`` times the operations that read a network's output with it in bfloat16 as well.
    """
    for name in selected:
        op = OPS[name]
        if not all(has_kernel(kernel, device) for kernel in op.kernels):
            continue
        for given in _inputs(op, bf16_raw):
            if containing in given.name:
                yield from _cases(name, op, given, device)


def _inputs(op: Op, bf16_raw: bool) -> Iterator[Input]:
    if op.inputs == "matrices":
        yield from (Input("", shape) for shape in MATRICES)
        return
    if op.inputs == "stacks":
        yield Input("A-128", (sum(count for count, *_ in A128_STACKS),))
        return
    if op.inputs == "features":
        for model in op.models:
            yield from (Input(model, shape) for shape in FEATURES)
            yield Input(model, FEATURES_CHANNELS_LAST, channels_last=True)
        return
    for raw_dtype in [torch.float32, *[torch.bfloat16] * (bf16_raw and op.reads_raw)]:
        for model, shapes in SHAPES.items():
            yield from (Input(model, shape, raw_dtype=raw_dtype) for shape in shapes)
        for model, shape in CHANNELS_LAST.items():
            yield Input(model, shape, channels_last=True, raw_dtype=raw_dtype)


def _cases(name: str, op: Op, given: Input, device: torch.device) -> Iterator[Case]:
    def outputs_of(function: Callable, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outputs = function(*tensors)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def function_of(module: Any, wrap: Callable[[Callable], Callable]) -> Callable:
        return wrap(lambda *tensors: op.call(module, list(tensors), given))

    def forward(module: Any, wrap: Callable[[Callable], Callable]) -> Function:
        function, tensors = function_of(module, wrap), op.tensors(given, Random(device))

        def call() -> object:
            with torch.no_grad():
                return function(*tensors)

        return call

    def forward_backward(module: Any, wrap: Callable[[Callable], Callable]) -> Function:
        function = function_of(module, wrap)
        leaves = tuple(tensor.requires_grad_() for tensor in op.tensors(given, Random(device)))
        gradients = [torch.ones_like(output) for output in outputs_of(function_of(ops, _as_it_is), leaves)]

        def call() -> object:
            moving = [(o, g) for o, g in zip(outputs_of(function, leaves), gradients) if o.requires_grad]
            outputs, grads = zip(*moving)
            # What torch.autograd.grad does once it has checked its arguments, which a training step does once for all
            # its operations: retain_graph, create_graph, the leaves, allow_unused, accumulate into .grad.
            return torch.autograd.Variable._execution_engine.run_backward(
                outputs, grads, False, False, leaves, False, accumulate_grad=False
            )

        return call

    with FakeTensorMode():  # sizes without data
        tensors = op.tensors(given, Random(device))
        inside = sum(map(_bytes, tensors))
        outside = sum(map(_bytes, outputs_of(function_of(plain, _as_it_is), tensors)))
    dtype = "float32 + bf16 raw" if given.raw_dtype == torch.bfloat16 else "float32"
    yield Case(name, given.name, "forward", dtype, inside + outside, forward)
    both = inside + outside + outside + inside * (2 if op.rereads else 1)
    yield Case(name, given.name, "forward + backward", dtype, both, forward_backward)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
