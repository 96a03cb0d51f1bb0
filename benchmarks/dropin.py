"""Flow code of other libraries before and after hflow_fast.accelerate, with the same weights, in one run.

python benchmarks/dropin.py [--glow-pytorch DIR] [--libraries normflows,freia,nflows,glow_pytorch] [--widths 512,64]
python benchmarks/dropin.py --no-run --markdown      the page's tables again, from the results there are

A Glow of L 3, K 16 on 16 images of 32 × 32 is built with each library (benchmarks/dropin_models.py), and once more, with
the state_dict of the first, and accelerated. DIR is a checkout of https://github.com/rosinality/glow-pytorch, which is
imported as it is. First, losses, every gradient and samples are compared in float64; if they differ, nothing is timed.
Then both sides are timed in turn, many times:

- training: forward and backward pass and a fused Adam, with coupling networks of each of --widths.
- sampling: a batch of images, without gradients, the weights unchanged since the last batch.
- flow: both once more with nothing but the flow part: every coupling network is replaced by a copy of a fixed tensor,
  for which a gradient is computed. Forward and backward pass without Adam, and sampling.
- glow: hflow_fast.models.Glow beside normflows' Glow, of equal L, K and width, training and sampling. These are two
  models: ours also has the edge bias, actnorms inside its networks and split priors that depend on the other half.
- memory: peak of a training step at K = --memory-depth, in a process of its own, above what libraries take, and
  above what weights, gradients and optimizer take, of steps that keep their activations and of nn.Reversible.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dropin_models import (
    BUILDERS,
    Chain,
    Shape,
    Subject,
    build_glow,
    import_glow_pytorch,
    is_installed,
    take_networks_out,
    version_of,
)
from torch import Tensor

from hflow_fast import accelerate
from hflow_fast.bench.agreement import (
    float64_by_default,
    relative,
    smooth_images,
    typical_norm,
    worst_gradient,
)
from hflow_fast.bench.measure import QUANTILES
from hflow_fast.bench.report import fill
from hflow_fast.bench.results import append_csv, provenance
from hflow_fast.bench.turns import quantiles, resident, time_in_turn

RESULTS = Path(__file__).parent / "results" / "model"
PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
PARTS = ("training", "sampling", "flow", "glow", "memory")
TOLERANCE = 1e-7
"""Relative, in float64: what the two may differ by."""
SMALL = {"levels": 2, "depth": 2, "resolution": 8, "batch": 2, "widths": [8], "repeats": 2, "memory_depth": 4}


def build_pair(library: str, shape: Shape, options: argparse.Namespace) -> dict[str, Subject]:
    """Stock and accelerated, with the same weights: away from zeros and identities, actnorms initialised from data."""
    torch.manual_seed(options.seed)
    sides = {side: BUILDERS[library](shape) for side in ("stock", "accelerated")}
    stock, fast = (subject.model.to(options.device).train() for subject in sides.values())
    move_away(sides["stock"], images(shape, options.device))
    fast.load_state_dict(stock.state_dict())
    report = accelerate(fast)
    if not report.replaced:
        raise SystemExit(f"dropin: nothing of {library} was replaced:\n{report}")
    print(f"{library}, {describe(shape)}:\n{report}", flush=True)
    if shape.width is None:
        x = images(shape, options.device)
        take_networks_out([stock, fast], lambda model: sides["stock"].loss(model, x))
    return sides


@torch.no_grad()
def move_away(subject: Subject, x: Tensor) -> None:
    """Weights away from zeros and identities, then actnorms initialised from data.

    Wide layers move less, so that what comes out of a network moves by as much at any width, and samples stay finite.
    """
    for parameter in subject.model.parameters():
        if parameter.requires_grad:
            inputs = math.prod(parameter.shape[1:])
            parameter.add_(min(0.02, 0.1 / math.sqrt(inputs)) * torch.randn_like(parameter))
    subject.loss(subject.model.train(), x)


def describe(shape: Shape) -> str:
    network = "flow part alone" if shape.width is None else f"width {shape.width}"
    return f"L {shape.levels}, K {shape.depth}, {shape.batch} × {shape.resolution} × {shape.resolution}, {network}"


def images(shape: Shape, device: torch.device) -> Tensor:
    """Smooth random images in [-0.5, 0.5]."""
    return smooth_images(shape.batch, shape.resolution, 4, device)


def compare(sides: Mapping[str, Subject], x: Tensor, seed: int) -> dict[str, float]:
    """Relative differences of losses, of samples, and of the gradient of the parameter where it is largest; in float64.

    Raises:
        SystemExit: They are not the same function.
    """
    losses, samples, gradients = [], [], []
    with float64_by_default():
        for subject in sides.values():
            model = subject.model.double().train()
            loss = subject.loss(model, x.double())
            loss.backward()
            losses.append(loss.detach())
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()
                              if parameter.grad is not None})  # fmt: skip
            model.zero_grad(set_to_none=True)
            torch.manual_seed(seed)
            with torch.no_grad():
                samples.append(subject.sample(model.eval(), len(x)))
            model.float()
    result = {"loss": relative(losses[1], losses[0]), "sample": relative(samples[1], samples[0])}
    if gradients[0].keys() != gradients[1].keys():
        raise SystemExit(f"dropin: gradients of one side only: {sorted(gradients[0].keys() ^ gradients[1].keys())}")
    worst, result["gradient"] = worst_gradient(gradients[1], gradients[0], typical_norm(gradients[0].values()))
    if not max(result.values()) <= TOLERANCE:
        raise SystemExit("dropin: the two differ: losses by {loss:.2g}, samples by {sample:.2g}, the gradient of "
                         "{worst} by {gradient:.2g}; times of different functions say nothing.".format(
                             worst=worst, **result))  # fmt: skip
    print("agree: losses to {loss:.1e}, samples to {sample:.1e}, every gradient to {gradient:.1e}".format(**result))
    return result


def works_of(subject: Subject, x: Tensor, optimizer: bool) -> dict[str, Callable[[], Any]]:
    model = subject.model
    # The rate is low so that weights stay those compared. Fused: else the optimizer takes longer than a small network.
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def training() -> None:
        model.train()
        subject.loss(model, x).backward()
        if optimizer:
            adam.step()
        adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sampling() -> Tensor:
        return subject.sample(model.eval(), len(x)).cpu()

    return {"training": training, "sampling": sampling}


def measure_library(library: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one library: whole models of every width, then the flow part."""
    whole = [part for part in options.parts if part in ("training", "sampling")]
    cases = [(replace(options.shape, width=width), whole) for width in options.widths] if whole else []
    if "flow" in options.parts:
        cases.append((replace(options.shape, width=None), ["training", "sampling"]))
    for shape, works in cases:
        sides = build_pair(library, shape, options)
        x = images(shape, options.device)
        differences = compare(sides, x, options.seed)
        yield from time_sides(library, shape, sides, works, options, differences)


def measure_glow(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of our Glow beside normflows', which are not the same function."""
    for width in options.widths:
        shape = replace(options.shape, width=width)
        sides = {"stock": BUILDERS["normflows"](shape), "hflow_fast.models.Glow": build_glow(shape)}
        for subject in sides.values():
            move_away(subject._replace(model=subject.model.to(options.device)), images(shape, options.device))
        yield from time_sides("glow", shape, sides, ["training", "sampling"], options, {})


def time_sides(
    case: str, shape: Shape, sides: Mapping[str, Subject], works: Sequence[str], options: argparse.Namespace,
    differences: Mapping[str, float],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    x = images(shape, options.device)
    functions = {name: works_of(subject, x, shape.width is not None) for name, subject in sides.items()}
    parameters = {name: sum(p.numel() for p in subject.model.parameters()) for name, subject in sides.items()}
    for work in works:
        times = time_in_turn({name: of_side[work] for name, of_side in functions.items()}, options.device,
                             options.repeats, warm_up=2)  # fmt: skip
        medians = {name: quantiles(values) for name, values in times.items()}
        turns = [first / other for first, other in zip(*times.values())]
        for name, values in medians.items():
            ratio = medians["stock"][1] / values[1]
            print(f"{case:<12} {work:<9} {'flow' if shape.width is None else shape.width:>5} {name:<24} "
                  f"{values[1]:9.4f} s ({values[0]:.4f}–{values[2]:.4f})   stock/this {ratio:5.2f}", flush=True)  # fmt: skip
            yield row(case, shape, work, name, "s", values, ratio, options) | {
                "turns_q20_q80": "" if name == "stock" else "–".join(f"{q:.2f}" for q in quantiles(turns)[::2]),
                "parameters": parameters[name],
                **{f"{what}_difference": f"{value:.1e}" for what, value in differences.items()}}  # fmt: skip


COLUMNS = ("case", "library_version", "work", "side", "width", "levels", "depth", "resolution", "batch", "unit",
           *(f"q{q}" for q in QUANTILES), "stock_over_this", "turns_q20_q80", "repeats", "parameters",
           "loss_difference", "sample_difference", "gradient_difference")  # fmt: skip


def row(
    case: str, shape: Shape, work: str, side: str, unit: str, values: Sequence[float], ratio: float,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    library = {"glow": "normflows", "memory": ""}.get(case, case)
    return dict.fromkeys(COLUMNS, "") | {
        "case": case, "library_version": version_of(library) if library else "", "work": work, "side": side,
        "width": "flow part" if shape.width is None else shape.width, "levels": shape.levels, "depth": shape.depth,
        "resolution": shape.resolution, "batch": shape.batch, "unit": unit,
        **{f"q{q}": f"{value:.5f}" for q, value in zip(QUANTILES, values)}, "stock_over_this": f"{ratio:.3f}",
        "repeats": options.repeats,
    }  # fmt: skip


def measure_memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the peak of a training step with activations kept and rebuilt, in processes of their own."""
    shape = replace(options.shape, width=options.widths[0], depth=options.memory_depth)
    peaks = {}
    for side in ("stock", "reversible"):
        command = [sys.executable, __file__, "--memory-of", side, "--widths", shape.width, "--device", options.device,
                   "--levels", shape.levels, "--depth", shape.depth, "--resolution", shape.resolution, "--batch",
                   shape.batch, *(["--threads", options.threads] if options.threads else [])]  # fmt: skip
        # With a fixed threshold the allocator hands freed tensors back, so that the process is as large as they are.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        output = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        if output.returncode:
            raise SystemExit(f"dropin: measuring the memory of {side} failed:\n{output.stderr}")
        peaks[side] = json.loads(output.stdout.splitlines()[-1])
    for work in ("peak", "activations"):
        for side, of_side in peaks.items():
            ratio = peaks["stock"][work] / of_side[work]
            print(f"memory       {work:<11} {shape.width:>5} {side:<24} {of_side[work]:9.1f} MiB   "
                  f"this/stock {1 / ratio:5.3f}", flush=True)  # fmt: skip
            yield row("memory", shape, work, side, "MiB", [of_side[work]] * 3, ratio, options)


def own_memory(side: str, options: argparse.Namespace) -> dict[str, float]:
    """MiB at the peak of two training steps, above the libraries, and above those and what lasts from step to step."""
    shape = replace(options.shape, width=options.widths[0])
    on_gpu = options.device.type == "cuda"
    train_chain(replace(shape, levels=1, depth=1, width=8, batch=1), side, options.device)  # loads what is loaded late
    before = 0.0 if on_gpu else resident("VmRSS")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    lasting = train_chain(shape, side, options.device) / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident("VmHWM") - before
    return {"peak": peak, "activations": peak - lasting}


def train_chain(shape: Shape, side: str, device: torch.device) -> int:
    """Two steps of a model of its own; bytes of its weights, gradients and Adam's two moments."""
    model = Chain(shape, reversible=side == "reversible").to(device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-6)
    x = images(shape, device)
    with torch.no_grad():
        model(x)
    for _ in range(2):
        model(x).mean().backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
    return 4 * sum(p.numel() * p.element_size() for p in model.parameters())


def measure(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of one library or part after another, so that each can be kept at once."""
    for library in options.libraries if {"training", "sampling", "flow"} & set(options.parts) else []:
        yield list(measure_library(library, options))
    if "glow" in options.parts:
        yield list(measure_glow(options))
    if "memory" in options.parts:
        yield list(measure_memory(options))


NAMES = {"normflows": "normflows", "freia": "FrEIA", "nflows": "nflows", "glow_pytorch": "rosinality/glow-pytorch"}


def tables(path: Path) -> dict[str, str]:
    """Markdown of the page's tables, by the name in its markers, from the newest rows."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    last = max(found, key=lambda line: line["date"])
    same = ("levels", "resolution", "batch", "device", "threads")
    key = ("case", "width", "work", "side", "depth")
    cells = {tuple(line[column] for column in key): line for line in found
             if all(line[column] == last[column] for column in same)}  # fmt: skip
    where = (f"L {last['levels']}, {last['batch']} × {last['resolution']} × {last['resolution']}; {last['device']}, "
             f"{last['threads']} threads, torch {last['torch']}, commit {last['commit']}, {last['date'][:10]}.")  # fmt: skip
    speed = [["model", "networks", "work", "before, ms", "after, ms", "before / after"]]
    memory = [["networks", "what", "kept, MiB", "Reversible, MiB", "Reversible / kept"]]
    for (case, width, work, side, depth), line in cells.items():
        stock = cells.get((case, width, work, "stock", depth))
        if side == "stock" or stock is None:
            continue
        network = width if width == "flow part" else f"width {width}"
        if case == "memory":
            memory.append([f"{network}, K {depth}", work, f"{float(stock['q50']):,.0f}", f"{float(line['q50']):,.0f}",
                           f"{float(line['q50']) / float(stock['q50']):.2f}"])  # fmt: skip
        else:
            name = ("hflow_fast.models.Glow, before: normflows" if case == "glow" else NAMES[case])
            speed.append([f"{name} {line['library_version']}", f"{network}, K {depth}", work, *(
                f"{1e3 * float(each['q50']):.4g} ({1e3 * float(each['q20']):.4g}–{1e3 * float(each['q80']):.4g})"
                for each in (stock, line)), f"{float(line['stock_over_this']):.2f}×"])  # fmt: skip
    return {name: f"{where}\n\n{markdown(lines)}" for name, lines in (("dropin", speed), ("dropin-memory", memory))
            if len(lines) > 1}  # fmt: skip


def markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            chosen = text.split(",")
            if not set(chosen) <= set(allowed):
                raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(allowed)}, separated by commas")
            return chosen

        return read

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", type=names(tuple(BUILDERS)), help="default: those that are installed, and "
                        "glow_pytorch with --glow-pytorch")
    parser.add_argument("--glow-pytorch", type=Path, help="checkout of rosinality/glow-pytorch")
    parser.add_argument("--widths", type=numbers, default=[512, 64], help="of coupling networks; memory: the first")
    parser.add_argument("--parts", type=names(PARTS), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    for name, value in (("levels", 3), ("depth", 16), ("resolution", 32), ("batch", 16), ("memory-depth", 48)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(device))
    parser.add_argument("--threads", type=int, help="of torch on the processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="everything as small as can be, to see that it works")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--markdown", type=Path, nargs="?", const=PAGE, help=f"fill the tables of a page ({PAGE.name})")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    parser.add_argument("--no-run", action="store_true", help="measure nothing: with --markdown, from the CSV file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.small:
        vars(options).update(SMALL)
    options.shape = Shape(options.levels, options.depth, options.resolution, options.batch)
    if options.no_run or options.memory_of:
        return options
    if options.glow_pytorch:
        if not (options.glow_pytorch / "model.py").is_file():
            parser.error(f"--glow-pytorch {options.glow_pytorch}: no model.py; clone "
                         "https://github.com/rosinality/glow-pytorch")
        import_glow_pytorch(options.glow_pytorch)
    options.libraries = options.libraries or [library for library in BUILDERS if is_installed(library)]
    needed = [*options.libraries, *(["normflows"] if "glow" in options.parts else [])]
    for library in needed:
        if not is_installed(library):
            parser.error("glow_pytorch needs --glow-pytorch DIR" if library == "glow_pytorch" else
                         f"{NAMES[library]} is not installed; pip install {NAMES[library]}, or choose others with "
                         "--libraries and --parts")  # fmt: skip
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(own_memory(options.memory_of, options)))
        return
    if not options.no_run:
        # Deprecations inside the libraries, at every call.
        warnings.filterwarnings("ignore", category=UserWarning, message=".*deprecated.*")
        torch.backends.cudnn.benchmark = True  # both sides have fixed shapes
        where = provenance(options.device)
        print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}", flush=True)
        for rows in measure(options):
            if not options.dry_run:
                append_csv(options.results / "dropin.csv", [each | where for each in rows])
    if options.markdown is not None:
        options.markdown.write_text(fill(options.markdown.read_text(), tables(options.results / "dropin.csv")))
        print(f"wrote {options.markdown}")


if __name__ == "__main__":
    main()
