"""A prediction, not a measurement: milliseconds per micro-batch on GPUs that are not at hand.

One micro-batch runs where the program runs, under a mode that sees every operation with its tensors. Each gets the
longest of three times: its FLOPs at a share of the device's peak, its bytes (every input and output once) at a share of
the bandwidth, and the shortest time a kernel takes. Their sum is the time the device is busy; launched one by one from
Python, a micro-batch takes at least as long as the launches. Every assumption has a favourable and an unfavourable
value, which give the lower and the upper end.

:func:`count` makes the counts, :func:`predict` the times, :func:`print_prediction` a table with the assumptions.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hflow_fast.training.ema import update_average
from hflow_fast.training.optimizer import clip_and_step

sys.path.append(str(Path(__file__).parents[1] / "python_tests" / "models"))

from calls import _FREE, Calls  # noqa: E402  the counter that the tests hold the model to

PRECISIONS = ("fp32", "tf32", "bf16")
_CONVOLUTIONS = ("convolution", "convolution_backward")
_IEEE_SIZE = 64
"""Square batched products of more channels are the rotations' and stay in float32 in every precision."""


@dataclass(frozen=True)
class Device:
    """Data-sheet peaks, dense and with float32 accumulation, and what is assumed about reaching them: (low, high)."""

    name: str
    teraflops: Mapping[str, float]
    bandwidth: float  # GB/s
    cache: float  # MiB of L2
    efficiency: tuple[float, float]  # of convolutions and matrix products
    source: str


DEVICES = (
    Device("RTX 3090", {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0}, 936.0, 6.0, (0.45, 0.60),
           "NVIDIA Ampere GA102 whitepaper, without sparsity"),
    Device("H100 SXM", {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4}, 3350.0, 50.0, (0.15, 0.35),
           "NVIDIA H100 data sheet, without sparsity; a batch of 4 does not fill it"),
)  # fmt: skip

BANDWIDTH_SHARE = 0.90
SHORTEST_KERNEL = (1.5e-6, 2.5e-6)  # seconds
EAGER_LAUNCH = (6e-6, 10e-6)
GRAPH_NODE = 0.9e-6
KERNELS_OF = {"linalg_matrix_exp": 40, "_linalg_slogdet": 6, "linalg_lu_solve": 3, "linalg_inv_ex": 6}
"""Operations that launch many kernels; every other one counts as one."""

ASSUMPTIONS = f"""Assumed: convolutions and products reach {{efficiency}} of the peak; {BANDWIDTH_SHARE:.0%} of the \
bandwidth; a kernel takes at least {SHORTEST_KERNEL[0] * 1e6:.1f}–{SHORTEST_KERNEL[1] * 1e6:.1f} µs,
a launch from Python {EAGER_LAUNCH[0] * 1e6:.0f}–{EAGER_LAUNCH[1] * 1e6:.0f} µs, a graph's node \
{GRAPH_NODE * 1e6:.1f} µs. At the lower end, tensors that fit half the L2 cost no memory traffic.
bf16 halves the bytes of convolutions; rotations are IEEE float32 always; host syncs are left out."""


@dataclass
class Operation:
    name: str
    flops: float
    bytes: int
    exact: bool  # kept in IEEE float32

    @property
    def kernels(self) -> int:
        return KERNELS_OF.get(self.name, 1)


@dataclass
class Work:
    """What one micro-batch does. ``once`` is done once per optimizer step, of ``groups`` micro-batches."""

    operations: list[Operation] = field(default_factory=list)
    once: list[Operation] = field(default_factory=list)
    groups: int = 1

    def weighted(self) -> Iterator[tuple[Operation, float]]:
        """Operations with the times they happen per micro-batch."""
        yield from ((operation, 1.0) for operation in self.operations)
        yield from ((operation, 1.0 / self.groups) for operation in self.once)

    @property
    def kernels(self) -> float:
        return sum(operation.kernels * share for operation, share in self.weighted())

    @property
    def flops(self) -> float:
        return sum(operation.flops * share for operation, share in self.weighted())

    @property
    def bytes(self) -> float:
        return sum(operation.bytes * share for operation, share in self.weighted())


class Recorder(Calls):
    """Counts operations by name, as the tests' counter does, and records FLOPs and bytes of those that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        name = function.overloadpacket.__name__
        if name not in _FREE:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.operations.append(Operation(name, _flops(function, args, kwargs or {}, result), size,
                                             name == "linalg_matrix_exp" or _is_rotation(name, tensors)))
        return result


def _flops(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> float:
    name = function.overloadpacket.__name__
    if name == "convolution":
        return _convolution_flops(result, args[1])
    if name == "convolution_backward":  # torch's formula takes grouped ones for dense
        return _convolution_flops(args[0], args[2]) * sum(args[-1][:2])
    if name == "linalg_matrix_exp":
        return _exponential_flops(args[0])
    formula = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))


def _convolution_flops(output: Tensor, weight: Tensor) -> float:
    return 2.0 * weight.numel() * output.shape[0] * math.prod(output.shape[2:])


def _exponential_flops(matrix: Tensor) -> float:
    """Of torch's: a series of degree 18 in five products, and squarings by the 1-norm, each matrix its own number."""
    norms = torch.linalg.matrix_norm(matrix.detach().double(), 1).clamp_min(1e-30)
    reach = 3.01 if matrix.dtype == torch.float32 else 1.09
    squarings = torch.log2(norms / reach).ceil().clamp_min(0)
    return float((5 + squarings).sum()) * 2.0 * matrix.shape[-1] ** 3


def _is_rotation(name: str, tensors: Sequence[Tensor]) -> bool:
    shape = tensors[0].shape if tensors else ()
    return name in ("bmm", "baddbmm", "baddbmm_") and shape[-1] == shape[-2] > _IEEE_SIZE


def count(step: Callable[[], Any]) -> Recorder:
    """What ``step`` does."""
    recorder = Recorder()
    with recorder:
        step()
    return recorder


def training_parts(runner: Any, images: Tensor) -> dict[str, Recorder]:
    """What a training step of ``vs_original``'s Original or Ours does, by part.

    "forward" and "backward" are of a micro-batch that is not the first, which finds gradients to add to; "begin" and
    "end" are once per step what prepares the weights and takes their gradients back; "optimizer" clips, steps and
    averages.
    """
    ours = hasattr(runner, "model")
    (runner.model if ours else runner.network).train()
    block = runner.model.prepared() if ours and not runner.plain else contextlib.nullcontext()
    losses = []
    parts = {"begin": count(block.__enter__)}
    for _ in range(2):
        parts["forward"] = count(lambda: losses.append(runner.loss(images).mean()))
        parts["backward"] = count(lambda: losses[-1].backward())
    parts["end"] = count(lambda: block.__exit__(None, None, None))
    parameters = [p for group in runner.optimizer.param_groups for p in group["params"]]
    gradients = [parameter.grad for parameter in parameters]

    def end_step() -> None:
        if ours:
            clip_and_step(runner.optimizer, losses[-1].detach(), runner.general.grad_clip)
            update_average(runner.average, runner.model, 0.005)
        else:
            runner.training([])

    groups = runner.optimizer.param_groups
    if not ours:  # what Adam does by default on a GPU, but not on a processor
        for group in groups:
            group["foreach"] = True
    end_step()  # the first one makes the optimizer's state
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    parts["optimizer"] = count(end_step)
    if not ours:
        for group in groups:
            group["foreach"] = None
    return parts


def works_of(
    runners: Mapping[str, Any], images: Tensor, groups: int
) -> tuple[dict[str, dict[str, Work]], dict[str, dict[str, int]]]:
    """Training and sampling of every side, for :func:`print_prediction`; and of each side its operations by part.

    Args:
        groups: micro-batches, each as large as ``images``, of an optimizer step.
    """
    works: dict[str, dict[str, Work]] = {"training": {}, "sampling": {}}
    operations = {}
    for name, runner in runners.items():
        parts = training_parts(runner, images)
        runner.sampling(len(images))  # fills the caches
        sampling = count(lambda: runner.sampling(len(images)))
        works["training"][name] = training_work(parts, groups)
        works["sampling"][name] = Work(sampling.operations)
        operations[name] = {part: recorder.work for part, recorder in (parts | {"sampling": sampling}).items()}
    return works, operations


def training_work(parts: Mapping[str, Recorder], groups: int) -> Work:
    """Per micro-batch, where an optimizer step has ``groups`` of them."""
    each = [operation for name in ("forward", "backward") for operation in parts[name].operations]
    once = [operation for name in ("begin", "end", "optimizer") for operation in parts[name].operations]
    return Work(each, once, groups)


def predict(work: Work, device: Device, precision: str, graph: bool) -> tuple[float, float]:
    """Milliseconds per micro-batch, favourable and unfavourable; launched from Python, or from a CUDA graph."""
    ends = []
    for high in (0, 1):
        busy = sum(_seconds(operation, device, precision, high) * share for operation, share in work.weighted())
        launches = work.kernels * (GRAPH_NODE if graph else EAGER_LAUNCH[high])
        ends.append(1e3 * max(busy, launches))
    return ends[0], ends[1]


def _seconds(operation: Operation, device: Device, precision: str, high: int) -> float:
    """Device time of one operation, all of its kernels."""
    rate = device.teraflops["fp32" if operation.exact else precision] * 1e12 * device.efficiency[1 - high]
    size = operation.bytes / (2 if precision == "bf16" and operation.name in _CONVOLUTIONS else 1)
    if not high and size <= device.cache * 2**20 / 2:
        size = 0.0
    moving = size / (BANDWIDTH_SHARE * device.bandwidth * 1e9)
    return max(operation.flops / rate, moving, operation.kernels * SHORTEST_KERNEL[high])


def print_prediction(config: str, works: Mapping[str, Mapping[str, Work]], batch: int) -> None:
    """The table.

    Args:
        works: "training" and "sampling", each the work of every side; the others are compared with the first.
    """
    print(f"\nPREDICTION, counted here and not timed on these devices: ms per micro-batch of {batch} of {config}, its\n"
          "share of the optimizer step included, and how many times longer the first side takes, launched one by one")
    for kind, sides in works.items():
        for side, work in sides.items():
            print(f"  {kind:<9} {side:<10} {work.kernels:8,.0f} kernels {work.flops / 1e9:9.1f} GFLOP "
                  f"{work.bytes / 2**30:7.2f} GiB")  # fmt: skip
    for device in DEVICES:
        low, high = device.efficiency
        print(f"{device.name}: " + ", ".join(f"{device.teraflops[p]:g} TFLOP/s {p}" for p in PRECISIONS)
              + f", {device.bandwidth:g} GB/s ({device.source}).")  # fmt: skip
        print(ASSUMPTIONS.format(efficiency=f"{low:.0%}–{high:.0%}"))
        for kind, side, precision, graph, times, ratios in rows(works, device):
            print(f"  {kind:<9} {side:<10} {precision} {'graph' if graph else 'eager'} "
                  f"{times[0]:8.2f}–{times[1]:<8.2f} ms   {ratios[0]:5.2f}–{ratios[1]:.2f}×")  # fmt: skip


def rows(works: Mapping[str, Mapping[str, Work]], device: Device) -> Iterator[tuple[Any, ...]]:
    """(work, side, precision, graph, times, ratios): the first side eager, as it runs; the others also from a graph.

    A ratio is that of two times under the same assumptions, so its ends are sorted, not crossed; bf16 is compared with
    the first side in tf32, which is what it can do.
    """
    for kind, sides in works.items():
        first = next(iter(sides))
        for side, work in sides.items():
            for precision in PRECISIONS:
                if side == first and precision == "bf16":
                    continue
                beside = predict(sides[first], device, "tf32" if precision == "bf16" else precision, False)
                for graph in (False,) if side == first else (False, True):
                    times = predict(work, device, precision, graph)
                    ratios = sorted(a / b for a, b in zip(beside, times))
                    yield kind, side, precision, graph, times, ratios
