"""Every op beside plain PyTorch (hflow_fast.reference), forward and forward + backward, in one run.

python benchmarks/bench_ops.py [--ops coupling flow_step] [--repeats 30] [--threads 2] [--device cuda] [--dry-run]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from _harness import Case, compare, device_name, print_table, write_csv
from torch import Tensor

from hflow_fast import ops, reference
from hflow_fast._extension import has_kernel
from hflow_fast.ops import CouplingSpec

SHAPES = {
    "HFlow A-128": [(4, 3, 128, 128), (4, 4, 64, 64), (4, 8, 32, 32), (4, 8, 8, 8), (16, 3, 128, 128), (16, 8, 32, 32)],
    "Glow": [(64, 12, 16, 16), (64, 24, 8, 8), (64, 48, 4, 4)],
    "64 MiB": [(16, 16, 256, 256)],
}
HFLOW = CouplingSpec("exp_clip", clamp=3.0, shift_clamp=5.0, active="checkerboard")
GLOW = CouplingSpec("sigmoid", form="add_scale", active="channels")
MATRICES = [(28, 4, 4), (28, 8, 8), (16, 48, 48)]  # A-128 has 28 small 1 × 1s


def arguments(
    op: str, shape: Sequence[int], model: str, device: torch.device
) -> tuple[list[Tensor], tuple[CouplingSpec, ...]]:
    """The tensors and options ``op`` is timed with."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    batch, channels, *pixels = shape
    x, spec = random(*shape), HFLOW if model == "HFlow A-128" else GLOW
    raw = random(batch, spec.raw_channels(spec.active_channels(channels)), *pixels)
    match op:
        case "actnorm":
            return [x, random(channels), random(channels)], ()
        case "conv1x1":
            return [x, random(channels, channels), random(channels)], ()
        case "coupling":
            return [x, raw], (spec,)
        case "flow_step":
            return [x, raw, random(channels, channels), random(channels)], (spec,)
        case _:
            return [x], ()


def forward(function: Callable, tensors: list[Tensor], options: tuple) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*tensors, *options)

    return call


def forward_backward(function: Callable, tensors: list[Tensor], options: tuple) -> Callable[[], object]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = function(*leaves, *options)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    moving = [i for i, output in enumerate(outputs) if output.requires_grad]
    gradients = [torch.randn_like(outputs[i]) for i in moving]

    def call() -> object:
        result = function(*leaves, *options)
        result = (result,) if isinstance(result, Tensor) else result
        return torch.autograd.grad([result[i] for i in moving], leaves, gradients)

    return call


def cases(selected: Sequence[str], device: torch.device) -> Iterator[Case]:
    for op in selected:
        shapes = {"": MATRICES} if op == "lu" else SHAPES
        for model, sizes in shapes.items():
            for shape in sizes:
                if op == "haar" and shape[2] < 2:
                    continue
                tensors, options = (
                    arguments(op, shape, model, device) if op != "lu" else ([torch.randn(shape, device=device)], ())
                )
                name = f"{model} {'×'.join(map(str, shape))}".strip()
                for work, timed in (("forward", forward), ("forward + backward", forward_backward)):
                    sides = (timed(getattr(module, op), tensors, options) for module in (ops, reference))
                    yield Case(op, name, work, *sides)


def main() -> None:
    every = ("actnorm", "conv1x1", "lu", "coupling", "flow_step", "haar")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=every, default=every, metavar="OP")
    parser.add_argument("--repeats", type=int, default=30, help="interleaved repeats of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV files"
    )
    parser.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    selected = [op for op in options.ops if has_kernel(op, options.device)]
    for op in set(options.ops) - set(selected):
        print(f"{op}: no kernel for {options.device}, nothing to compare")
    print(f"{device_name(options.device)}, {options.threads} threads, torch {torch.__version__}")
    timings = [compare(case, options.device, options.repeats) for case in cases(selected, options.device)]
    if timings:
        print_table(timings)
    if timings and not options.dry_run:
        write_csv(timings, options.device, options.results)


if __name__ == "__main__":
    main()
