"""Rounding error of the round trip through a deep flow in float32: ours beside the same flow in plain PyTorch.

python benchmarks/round_trip.py [--steps 100] [--seeds 10] [--device cuda] [--dry-run]

The flow is a chain of FlowSteps (coupling → actnorm → 1 × 1 convolution) with trained-like weights, the HFlow and the
Glow way. Plain PyTorch runs the same layers one by one, with the same networks and parameters, and inverts the matrices
with torch.linalg.inv. An error is the root mean square of x − inverse(forward(x)), or of z − forward(inverse(z)),
divided by that of the input; the table has geometric means over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hflow_fast import reference
from hflow_fast.bench.results import provenance
from hflow_fast.nn import CouplingSpec, FlowStep, Sequential

RESULTS = Path(__file__).parent / "results" / "accuracy"
FLOWS = {
    "HFlow": dict(
        channels=4, parametrization="full", swap_directions=True,
        specs=[CouplingSpec("exp_clip", clamp=3.0, shift_clamp=5.0, active="checkerboard", parity=p) for p in (0, 1)],
    ),
    "Glow": dict(
        channels=12, parametrization="plu", swap_directions=False,
        specs=[CouplingSpec("sigmoid", form="add_scale", active="channels")],
    ),
}  # fmt: skip
DIRECTIONS = ("data → latent → data", "latent → data → latent")


def network(channels: int, spec: CouplingSpec) -> nn.Module:
    inputs = channels if spec.spatial else channels // 2
    outputs = spec.raw_channels(spec.active_channels(channels))
    return nn.Sequential(
        nn.Conv2d(inputs, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, outputs, 3, padding=1)
    )  # fmt: skip


@torch.no_grad()
def build(name: str, steps: int, seed: int, device: torch.device | str = "cpu") -> tuple[Sequential, Tensor]:
    """A flow of that kind, and data to send through it."""
    torch.manual_seed(seed)
    flow, x = FLOWS[name], torch.randn(4, FLOWS[name]["channels"], 16, 16)
    chain = Sequential(*(
        FlowStep(flow["channels"], network(flow["channels"], spec), spec, flow["swap_directions"],
                 flow["parametrization"])
        for spec in (flow["specs"][step % len(flow["specs"])] for step in range(steps))
    ))  # fmt: skip
    # Matrices away from rotations, couplings that move every value by a tenth or so, and actnorm as in training. Random
    # flows that do more amplify everything beyond measure in a hundred steps; trained ones cannot.
    for step in chain:
        step.coupling.net[-1].weight.mul_(0.3)
        for parameter in step.invconv.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    chain(x)
    return chain.to(device).eval(), x.to(device)


class Plain:
    """``chain`` in plain PyTorch."""

    def __init__(self, chain: Sequential) -> None:
        self.chain = chain
        self.matrices = [step.invconv.matrix_and_log_det()[0] for step in chain]

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        for step, matrix in zip(self.chain, self.matrices):
            coupling = step.coupling
            x, _ = reference.coupling(x, coupling.raw(x), coupling.spec, inverse=coupling.swap_directions)
            x, _ = reference.actnorm(x, step.actnorm.log_scale, step.actnorm.bias, inverse=True)
            x = F.conv2d(x, matrix[:, :, None, None])
        return (x,)

    def inverse(self, z: Tensor) -> tuple[Tensor]:
        for step, matrix in zip(reversed(self.chain), reversed(self.matrices)):
            coupling = step.coupling
            z = F.conv2d(z, torch.linalg.inv(matrix)[:, :, None, None])
            z, _ = reference.actnorm(z, step.actnorm.log_scale, step.actnorm.bias)
            z, _ = reference.coupling(z, coupling.raw(z), coupling.spec, inverse=not coupling.swap_directions)
        return (z,)


@torch.no_grad()
def errors(flow: Sequential | Plain, x: Tensor) -> tuple[float, float]:
    """Relative round-trip errors, in the order of DIRECTIONS; latents are standard normal."""
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    pairs = (x, flow.inverse(flow(x)[0])[0]), (z, flow(flow.inverse(z)[0])[0])
    return tuple(float((there - back).double().norm() / there.double().norm()) for there, back in pairs)


def compare(name: str, steps: int, seeds: Sequence[int], device: torch.device | str = "cpu") -> list[tuple[float, ...]]:
    """For each direction: the geometric means of our error and of plain PyTorch's, and of their ratio's spread."""
    results = []
    for seed in seeds:
        chain, x = build(name, steps, seed, device)
        results.append((errors(chain, x), errors(Plain(chain), x)))
    table = []
    for direction in range(len(DIRECTIONS)):
        ours, plain = ([result[side][direction] for result in results] for side in (0, 1))
        ratios = sorted(theirs / mine for mine, theirs in zip(ours, plain))
        table.append((*map(statistics.geometric_mean, (ours, plain, ratios)), ratios[0], ratios[-1]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    where = provenance(options.device)
    print(f"{where['device']}, torch {where['torch']}, {options.steps} steps, {options.seeds} seeds")
    print(f"{'flow':<6} {'direction':<23} {'ours':>9} {'plain torch':>12} {'ratio (range)':>21}")
    rows = []
    for name in FLOWS:
        for direction, row in zip(DIRECTIONS, compare(name, options.steps, range(options.seeds), options.device)):
            ours, plain, ratio, low, high = row
            print(f"{name:<6} {direction:<23} {ours:9.2e} {plain:12.2e} {ratio:8.2f} ({low:.2f}–{high:.2f})")
            numbers = [f"{ours:.3e}", f"{plain:.3e}", *(f"{value:.3f}" for value in (ratio, low, high))]
            rows.append([name, direction, options.steps, options.seeds, *numbers, *where.values()])
    if not options.dry_run:
        path = options.results / "round_trip.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["flow", "direction", "steps", "seeds", "ours", "plain", "ratio", "ratio_min",
                                 "ratio_max", *where])  # fmt: skip
            writer.writerows(rows)


if __name__ == "__main__":
    main()
