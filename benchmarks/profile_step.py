"""Where the time of one training step of HFlow goes: the original's, ours plain, prepared, and in channels_last.

python benchmarks/profile_step.py --original DIR [--config A-128] [--batch 4] [--groups 2] [--markdown [PAGE]]
python benchmarks/profile_step.py --no-run --markdown      the page again, from the results there are

Each side takes one optimizer step of --groups micro-batches under torch's profiler. Time is that of the program's
thread, an operation's own without what it calls, and on a GPU also that of its kernels. An operation belongs to the
part of the model that calls it, in the backward pass to that of its forward counterpart. What lies between the
operations, in Python and in autograd's engine, is the last line; the profiler makes it longer than it is, so that
the step's time without it stands beside.

Before, the operations of a micro-batch are counted as python_tests/models/test_launches.py does, and with their FLOPs
and bytes they make the prediction for GPUs that are not at hand (predict.py). DIR is a checkout of
https://github.com/timoneh/hflow. Writes profile.csv, operations.csv and prediction.csv in benchmarks/results/model.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).parent))

import predict  # noqa: E402
import vs_original  # noqa: E402

from hflow_fast.bench.report import fill  # noqa: E402
from hflow_fast.bench.results import append_csv, provenance  # noqa: E402
from hflow_fast.bench.turns import clock  # noqa: E402
from hflow_fast.models.hflow import affines, effective, layers  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SIDES = ("original", "plain", "prepared", "channels_last")
BACKWARD = "autograd::engine::evaluate_function: "
REGION = "in "
"""Prefix of what :func:`regions` records."""

CONVOLUTION, CONVOLUTION_BACKWARD = "convolutions, forward", "convolutions, backward"
EXPONENTIAL, MAPS, FLOW = "matrix exponential", "channel maps, LU", "flow: coupling, 1×1, actnorm"
NORM, RESAMPLE, ACTIVATION = "instance norm", "resampling", "activations, biases"
WEIGHTS, SUMS, OPTIMIZER = "weight scaling", "sums of gradients", "clipping, optimizer, average"
DATA, OTHER, PYTHON = "data to the device", "other operations", "between operations"
NETWORK = "network"
CATEGORIES = (CONVOLUTION, CONVOLUTION_BACKWARD, EXPONENTIAL, MAPS, FLOW, NORM, RESAMPLE, ACTIVATION, WEIGHTS, SUMS,
              OPTIMIZER, DATA, OTHER, PYTHON)  # fmt: skip

# Regions that take everything inside, convolutions too. The others leave operations with a name of their own to it.
_CLAIMING = {EXPONENTIAL, MAPS, FLOW, NORM, RESAMPLE, SUMS, OPTIMIZER, DATA}
_BY_NAME = {
    "_Exponential": EXPONENTIAL, "_ExponentialBackward": EXPONENTIAL, "aten::linalg_matrix_exp": EXPONENTIAL,
    "_ScaleBackward": WEIGHTS, "torch::autograd::AccumulateGrad": SUMS,
    BACKWARD + "torch::autograd::AccumulateGrad": SUMS,
}  # fmt: skip
_BY_PREFIX = {
    "aten::convolution_backward": CONVOLUTION_BACKWARD, "aten::conv": CONVOLUTION, "aten::linear": CONVOLUTION,
    "aten::addmm": CONVOLUTION, "aten::leaky_relu": ACTIVATION, "aten::tanh": ACTIVATION, "aten::lerp": OPTIMIZER,
    "hflow_fast::conv3x3_bwd": CONVOLUTION_BACKWARD, "hflow_fast::conv3x3": CONVOLUTION,
    "hflow_fast::bias_act": ACTIVATION, "hflow_fast::instance_norm": NORM, "hflow_fast::resample": RESAMPLE,
    "hflow_fast::lu": MAPS, "hflow_fast::": FLOW, "aten::linalg_": MAPS, "aten::_linalg_": MAPS,
    "Optimizer.": OPTIMIZER,
}  # fmt: skip


@contextlib.contextmanager
def regions(network: Any) -> Iterator[None]:
    """Records which part of the model, the original's ``network`` module or ours, calls an operation."""
    marked = [
        (network, ("decimate2_torch", "interpolate2_torch"), RESAMPLE),
        (network.PoolingCouplingCNN, ("instance_norm",), NORM), (network.CouplingCNN, ("instance_norm",), NORM),
        (network.Unet, ("instance_norm",), NORM), (network.EncoderDecoderBlock, ("instance_norm",), NORM),
        (network.PoolingCouplingCNN, ("forward",), NETWORK), (network.CouplingCNN, ("forward",), NETWORK),
        (network.MyConv, ("forward",), WEIGHTS), (network.MyLinear, ("forward",), WEIGHTS),
        (network.Step, ("forward", "inverse"), FLOW), (network.ResolutionSteps, ("_permutationLogDet",), MAPS),
    ] if network is not None else []  # fmt: skip
    marked += [
        (layers.Equalized, ("scaled",), WEIGHTS), (effective, ("_scaled",), WEIGHTS),
        (effective.EffectiveWeights, ("collect",), SUMS), (effective, ("fold_to_latent",), MAPS),
        (affines.StepAffines, ("to_latent", "to_data"), MAPS), (vs_original, ("clip_and_step",), OPTIMIZER),
        (vs_original, ("update_average",), OPTIMIZER), (torch.nn.utils, ("clip_grad_norm_",), OPTIMIZER),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, names, category in marked:
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, _recorded(getattr(owner, name), category)))
        yield


def _recorded(function: Callable[..., Any], category: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(REGION + category):
            return function(*args, **kwargs)

    return call


def categorize(events: Iterable[Any]) -> dict[str, list[float]]:
    """[milliseconds of the host, of the device, calls] by category, from the profiler's events.

    Calls are operations that no other operation calls.
    """
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    of_forward: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and event.scope == 0:
            of_forward[event.sequence_nr] = _category(event, {})  # the last one made the node in autograd's graph
    table = {category: [0.0, 0.0, 0] for category in CATEGORIES}
    for event in events:
        is_operation = _is_operation(event)
        category = _category(event, of_forward) if is_operation else PYTHON
        line = table[category]
        line[0] += event.self_cpu_time_total / 1e3
        line[1] += event.self_device_time_total / 1e3
        line[2] += is_operation and not (event.cpu_parent is not None and _is_operation(event.cpu_parent))
    return table


def _is_operation(event: Any) -> bool:
    return event.name.startswith(("aten::", "hflow_fast::"))


def _category(event: Any, of_forward: Mapping[int, str]) -> str:
    """The innermost region if it claims what is inside, else the operation's own, else the region's."""
    own = None
    while event is not None:
        if event.name.startswith(BACKWARD):
            inherited = of_forward.get(event.sequence_nr, OTHER)
            if inherited not in (OTHER, PYTHON):
                return CONVOLUTION_BACKWARD if inherited == CONVOLUTION else inherited
        region = event.name.removeprefix(REGION) if event.name.startswith(REGION) else None
        named = region or _BY_NAME.get(event.name) or _by_prefix(event.name)
        if region or event.name in _BY_NAME or named == OPTIMIZER:
            if named in _CLAIMING:
                return named
            if own is not None or named != NETWORK:
                return own or named
            return OTHER
        own = named or own  # the outermost operation: a convolution, not the copy it makes
        event = event.cpu_parent
    return own or OTHER


@functools.lru_cache(maxsize=None)
def _by_prefix(name: str) -> str | None:
    return next((category for prefix, category in _BY_PREFIX.items() if name.startswith(prefix)), None)


def profile_side(runner: Any, parts: Sequence[torch.Tensor], network: Any,
                 device: torch.device) -> tuple[dict[str, list[float]], float, float]:
    """The table of :func:`categorize`, and the step's milliseconds without and with the profiler."""
    host = [part.cpu() for part in parts]

    def step() -> None:
        with record_function(REGION + DATA):
            moved = [part.to(device, non_blocking=True) for part in host]
        runner.training(moved)

    alone = 1e3 * clock(step, device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with regions(network), profile(activities=activities) as profiler:
        wall = 1e3 * clock(step, device)
    table = categorize(profiler.events())
    table[PYTHON][0] = max(0.0, wall - sum(line[0] for category, line in table.items() if category != PYTHON))
    return table, alone, wall


def run(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The rows of every CSV file, by its name."""
    original, model = vs_original.build_pair(options)
    original.ready()
    copies = {mode: vs_original.copy.deepcopy(model) for mode in SIDES[1:]}
    runners = {"original": original}
    runners |= {mode: vs_original.Ours(copy, options.settings, mode, options.groups) for mode, copy in copies.items()}
    common = {"config": options.config, "batch": options.batch}
    end = provenance(options.device)
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    images = vs_original.images(options, options.batch)
    counted = {name: runner for name, runner in runners.items() if name != "channels_last"}  # has a processor's kernels
    works, operations = predict.works_of(counted, images, options.step_groups)
    for name, counts in operations.items():
        files["operations"] += [common | {"side": name, "part": part, "operations": number} | end
                                for part, number in counts.items()]  # fmt: skip
        numbers = ", ".join(f"{part} {number:,}" for part, number in counts.items())
        print(f"{name:<9} operations: {numbers}", flush=True)
    network = sys.modules.get("hflow.network")
    for name, runner in runners.items():
        table, alone, wall = profile_side(runner, vs_original.parts_of(options), network, options.device)
        report(name, table, alone, wall)
        files["profile"] += [
            common | {"groups": options.groups, "side": name, "category": category, "ms": f"{ms:.2f}",
                      "device_ms": f"{device_ms:.2f}", "share": f"{ms / wall:.4f}", "calls": calls,
                      "step_ms": f"{alone:.2f}", "profiled_ms": f"{wall:.2f}"} | end
            for category, (ms, device_ms, calls) in table.items()
        ]  # fmt: skip
    predict.print_prediction(options.config, works, options.batch)
    files["prediction"] = [
        common | {"groups": options.step_groups, "gpu": device.name, "work": work, "side": side, "precision": precision,
                  "launches": "graph" if graph else "eager", "ms_low": f"{times[0]:.2f}", "ms_high": f"{times[1]:.2f}",
                  "ratio_low": f"{ratios[0]:.2f}", "ratio_high": f"{ratios[1]:.2f}"} | end
        for device in predict.DEVICES
        for work, side, precision, graph, times, ratios in predict.rows(works, device)
    ]  # fmt: skip
    return files


def report(name: str, table: Mapping[str, Sequence[float]], alone: float, wall: float) -> None:
    print(f"\n{name}: a step takes {alone:.1f} ms, {wall:.1f} ms under the profiler")
    for category, (ms, device_ms, calls) in table.items():
        device = f"{device_ms:10.1f} ms of kernels" if device_ms else ""
        print(f"  {category:<30} {ms:10.1f} ms {ms / wall:6.1%} {calls:8,} calls{device}", flush=True)


def newest(path: Path, *key: str) -> list[dict[str, str]]:
    """The last row of every ``key`` of the newest run's configuration and device."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    same = ("config", "batch", "device", "threads")
    last = max(rows, key=lambda row: row["date"])
    return list({tuple(row[column] for column in key): row for row in rows
                 if all(row[column] == last[column] for column in same)}.values())  # fmt: skip


def tables(folder: Path) -> dict[str, str]:
    """Markdown of every table of the page, by the name in its markers."""
    result = {}
    rows = newest(folder / "profile.csv", "side", "category")
    if rows:
        sides = list(dict.fromkeys(row["side"] for row in rows))
        cells = {(row["side"], row["category"]): row for row in rows}
        lines = [["part", *(f"{side}, ms" for side in sides), *(f"{side}, calls" for side in sides)]]
        for category in dict.fromkeys(row["category"] for row in rows):
            found = [cells[side, category] for side in sides]
            lines.append([category, *(f"{float(r['ms']):,.1f} ({float(r['share']):.0%})" for r in found),
                          *(f"{int(r['calls']):,}" for r in found)])  # fmt: skip
        firsts = [cells[side, rows[0]["category"]] for side in sides]
        for label, column in (("the step, profiled", "profiled_ms"), ("the step, without profiler", "step_ms")):
            lines.append([label, *(f"{float(row[column]):,.1f}" for row in firsts), *([""] * len(sides))])
        result["profile"] = _table(lines, rows[-1], f", {rows[-1]['groups']} micro-batches")
    rows = newest(folder / "operations.csv", "side", "part")
    if rows:
        sides = list(dict.fromkeys(row["side"] for row in rows))
        cells = {(row["side"], row["part"]): f"{int(row['operations']):,}" for row in rows}
        lines = [["part", *sides]]
        lines += [[part, *(cells[side, part] for side in sides)] for part in dict.fromkeys(r["part"] for r in rows)]
        result["operations"] = _table(lines, rows[-1])
    rows = newest(folder / "prediction.csv", "gpu", "work", "side", "precision", "launches")
    if rows:
        lines = [["GPU", "work", "side", "precision", "launches", "ms per micro-batch", "original / this"]]
        lines += [[row["gpu"], row["work"], row["side"], row["precision"], row["launches"],
                   f"{row['ms_low']}–{row['ms_high']}", f"{row['ratio_low']}–{row['ratio_high']}"] for row in rows]
        result["prediction"] = _table(lines, rows[-1])
    rows = newest(folder / "vs_original.csv", "work", "side", "precision", "groups")
    if rows:  # the ratios of a work are those of one run
        dates = {row["work"]: row["date"] for row in sorted(rows, key=lambda row: row["date"])}
        rows = [row for work in vs_original.WORKS for row in rows
                if row["work"] == work and row["date"] == dates[work]]  # fmt: skip
        commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
        lines = [["work", "side", "precision", "median", "20–80 %", "original / this"]]
        lines += [[row["work"], row["side"], row["precision"], f"{_short(row['q50'])} {row['unit']}",
                   f"{_short(row['q20'])}–{_short(row['q80'])}", f"{float(row['original_over_this']):.2f}"]
                  for row in rows]  # fmt: skip
        result["vs_original"] = _table(lines, rows[-1] | {"commit": commits}, f" × {rows[-1]['groups']}")
    return result


def _short(number: str) -> str:
    """Three digits, or all before the point."""
    return f"{float(number):.3g}" if float(number) < 100 else f"{float(number):,.0f}"


def _table(lines: Sequence[Sequence[str]], row: Mapping[str, str], more: str = "") -> str:
    header, *body = lines
    text = [f"{row['config']}, batch {row['batch']}{more}; {row['device']}, {row['threads']} threads, torch "
            f"{row['torch']}, commit {row['commit']}, {row['date'][:10]}.", ""]  # fmt: skip
    text += [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body)]
    return "\n".join(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", help="checkout of timoneh/hflow")
    parser.add_argument("--config", default="A-128", help="preset or JSON file")
    parser.add_argument("--batch", type=int, default=4, help="images of a micro-batch")
    parser.add_argument("--groups", type=int, default=2, help="micro-batches of the step that is profiled")
    parser.add_argument("--step-groups", type=int, default=4, help="micro-batches of a step in the prediction")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--precision", choices=("tf32", "fp32"), help="on a GPU; default tf32 there")
    parser.add_argument("--threads", type=int, help="of torch on the processor")
    parser.add_argument("--results", type=Path, default=vs_original.RESULTS, help="folder of the CSV files")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    parser.add_argument("--no-run", action="store_true", help="measure nothing: with --markdown, from the CSV files")
    parser.add_argument("--markdown", type=Path, nargs="?", const=PAGE, help=f"fill the tables of a page ({PAGE.name})")
    mine = parser.parse_args(arguments)
    if mine.no_run:
        return mine
    if mine.original is None:
        parser.error("--original DIR is needed, unless --no-run")
    passed = ["--original", mine.original, "--config", mine.config, "--batch", str(mine.batch), "--groups",
              str(mine.groups), "--results", str(mine.results)]  # fmt: skip
    for name in ("device", "precision", "threads"):
        if getattr(mine, name) is not None:
            passed += [f"--{name}", str(getattr(mine, name))]
    options = vs_original.parse(passed)
    for name in ("step_groups", "dry_run", "no_run", "markdown"):
        setattr(options, name, getattr(mine, name))
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.no_run:
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
        for name, rows in run(options).items():
            if not options.dry_run:
                append_csv(options.results / f"{name}.csv", rows)
    if options.markdown is not None:
        options.markdown.write_text(fill(options.markdown.read_text(), tables(options.results)))
        print(f"wrote {options.markdown}")


if __name__ == "__main__":
    main()
