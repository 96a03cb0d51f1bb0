"""3×3 convolutions in float32 and channels_last: ours, by Winograd's filtering, beside PyTorch's, which oneDNN computes.

python benchmarks/bench_conv3x3.py [--threads 2] [--batch 4] [--repeats 15] [--containing 64×64] [--dry-run] [--markdown]

The shapes are those of A-128's networks; all are timed by the kernel, whether conv3x3 would choose it there or not. The
two sides take turns. Errors are norms, beside float64: of the outputs, or of the weights' gradient.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hflow_fast.bench.measure import QUANTILES
from hflow_fast.bench.report import fill
from hflow_fast.bench.results import append_csv, provenance
from hflow_fast.bench.turns import quantiles, time_in_turn

RESULTS = Path(__file__).parent / "results" / "networks" / "conv3x3.csv"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
CPU = torch.device("cpu")


class Shape(NamedTuple):
    inputs: int
    outputs: int
    side: int
    groups: int = 1

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.inputs}→{self.outputs}{groups}, {self.side}×{self.side}"


SHAPES = [
    Shape(64, 64, 64), Shape(128, 128, 32), Shape(512, 512, 32), Shape(256, 256, 64), Shape(32, 32, 128),
    Shape(512, 512, 16), Shape(256, 256, 32), Shape(64, 64, 128), Shape(64, 128, 32, 2), Shape(64, 64, 64, 2),
    Shape(153, 153, 16), Shape(64, 256, 64), Shape(40, 128, 32), Shape(20, 64, 64), Shape(128, 128, 8),
    Shape(512, 512, 8), Shape(16, 16, 128),
]  # fmt: skip

Sides = dict[str, Callable[[], Any]]


def tensors_of(shape: Shape, batch: int) -> list[Tensor]:
    """x, weight, bias, and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).contiguous(memory_format=torch.channels_last)

    fan_in = shape.inputs // shape.groups
    weight = random(shape.outputs, fan_in, 3, 3) / (3 * fan_in**0.5)
    gradient = random(batch, shape.outputs, shape.side, shape.side)
    return [random(batch, shape.inputs, shape.side, shape.side), weight, torch.zeros(shape.outputs), gradient]


def library_backward(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor, groups: int) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, list(bias.shape), [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [True, True, True])


def works(shape: Shape, batch: int) -> dict[str, Sides]:
    *forward, gradient = tensors_of(shape, batch)
    backward, groups = [*forward, gradient], shape.groups
    return {
        "forward": {"ours": partial(torch.ops.hflow_fast.conv3x3_fwd, *forward, groups),
                    "torch": partial(F.conv2d, *forward, padding=1, groups=groups)},
        "backward": {"ours": partial(torch.ops.hflow_fast.conv3x3_bwd, *backward, groups),
                     "torch": partial(library_backward, *backward, groups)},
    }


def errors(shape: Shape, batch: int, work: str, sides: Sides) -> dict[str, float]:
    *forward, gradient = (tensor.double() for tensor in tensors_of(shape, batch))
    if work == "forward":
        exact = F.conv2d(*forward, padding=1, groups=shape.groups)
        found = {side: function() for side, function in sides.items()}
    else:
        exact = library_backward(*forward, gradient, shape.groups)[1]
        found = {side: function()[1] for side, function in sides.items()}
    return {side: float((tensor - exact).norm() / exact.norm()) for side, tensor in found.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    last = rows[-1]
    lines = [f"Batch {last['batch']}; {last['device']}, {last['threads']} threads, torch {last['torch']}, commit "
             f"{last['commit']}, {last['date'][:10]}. Medians in milliseconds.", "",
             "| channels, pixels | work | PyTorch | ours | ratio | error of PyTorch | of ours |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    lines += [f"| {row['case']} | {row['work']} | {float(row['torch_ms_q50']):.2f} | {float(row['ours_ms_q50']):.2f} | "
              f"{row['ratio']} | {row['torch_error']} | {row['ours_error']} |" for row in rows]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--containing", default="", help="only shapes whose name contains this")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    parser.add_argument("--markdown", type=Path, nargs="?", const=PAGE, help=f"fill the table of a page ({PAGE.name})")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = provenance(CPU)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, batch {options.batch}")
    print(f"{'':<32} {'work':<9} {'torch, ms':>10} {'ours, ms':>10} {'ratio':>6} {'error torch':>12} {'error ours':>11}")
    rows = []
    for shape in SHAPES:
        if options.containing not in str(shape):
            continue
        for work, sides in works(shape, options.batch).items():
            times = {side: quantiles([1e3 * seconds for seconds in found])
                     for side, found in time_in_turn(sides, CPU, options.repeats, warm_up=2).items()}
            ratio, error = times["torch"][1] / times["ours"][1], errors(shape, options.batch, work, sides)
            print(f"{shape!s:<32} {work:<9} {times['torch'][1]:10.2f} {times['ours'][1]:10.2f} {ratio:6.2f} "
                  f"{error['torch']:12.1e} {error['ours']:11.1e}", flush=True)
            row = {"case": str(shape), "batch": options.batch, "work": work, "ratio": f"{ratio:.2f}"}
            for side in ("torch", "ours"):
                row |= {f"{side}_ms_q{q}": f"{value:.3f}" for q, value in zip(QUANTILES, times[side])}
                row[f"{side}_error"] = f"{error[side]:.1e}"
            rows.append(row | where)
    if rows and not options.dry_run:
        append_csv(options.results, rows)
    if rows and options.markdown:
        options.markdown.write_text(fill(options.markdown.read_text(), {"convolutions": table(rows)}))


if __name__ == "__main__":
    main()
