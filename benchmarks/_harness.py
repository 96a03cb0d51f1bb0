"""Times of two implementations of the same thing, side by side: interleaved repeats, quantiles, a table and a CSV."""

from __future__ import annotations

import csv
import datetime
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hflow_fast
from hflow_fast._extension import build_info

__all__ = ["Case", "Timing", "commit", "compare", "device_name", "print_table", "write_csv"]

Function = Callable[[], object]
QUANTILES = (20, 50, 80)  # %


@dataclass(frozen=True)
class Case:
    """One line of the table: what is timed, ours and theirs as functions without arguments."""

    op: str
    name: str
    work: str  # "forward" or "forward + backward"
    ours: Function
    theirs: Function


@dataclass(frozen=True)
class Timing:
    """Quantiles in microseconds per call (20, 50, 80 %)."""

    case: Case
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by medians."""
        return self.theirs[1] / self.ours[1]


def _seconds(function: Function, calls: int, device: torch.device) -> float:
    """Wall time of one call, averaged over ``calls``; waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def compare(case: Case, device: torch.device, repeats: int, shortest: float = 1e-3) -> Timing:
    """Time both sides alternately ``repeats`` times, each time over enough calls to last ``shortest`` seconds."""
    sides = (case.ours, case.theirs)
    for function in sides:
        _seconds(function, 3, device)  # warm up
    calls = [max(1, math.ceil(shortest / _seconds(function, 3, device))) for function in sides]
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, count, times in zip(sides, calls, samples):
            times.append(_seconds(function, count, device) * 1e6)
    return Timing(case, *(_quantiles(times) for times in samples))


def _quantiles(times: Sequence[float]) -> tuple[float, ...]:
    if len(times) == 1:
        return tuple(times) * len(QUANTILES)
    percentiles = statistics.quantiles(times, n=100, method="inclusive")
    return tuple(percentiles[q - 1] for q in QUANTILES)


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(timings: Sequence[Timing]) -> None:
    """One line per case, and the geometric mean of the ratios of each op and kind of work."""
    print(f"{'op':<10} {'case':<34} {'work':<19} {'ours µs (20–80 %)':>26} {'torch µs (20–80 %)':>28} {'ratio':>6}")
    for t in timings:
        ours, theirs = (f"{m:9.1f} ({low:.1f}–{high:.1f})" for low, m, high in (t.ours, t.theirs))
        print(f"{t.case.op:<10} {t.case.name:<34} {t.case.work:<19} {ours:>26} {theirs:>28} {t.ratio:6.2f}")
    print("geometric means of the ratios")
    for op, work in dict.fromkeys((t.case.op, t.case.work) for t in timings):
        ratios = [t.ratio for t in timings if (t.case.op, t.case.work) == (op, work)]
        print(f"  {op:<10} {work:<19} {statistics.geometric_mean(ratios):5.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


def write_csv(timings: Sequence[Timing], device: torch.device, folder: Path) -> None:
    """Append to ``folder/<op>.csv``, with what is needed to judge the numbers later."""
    columns = ["op", "case", "work", *(f"{side}_us_q{q}" for side in ("ours", "torch") for q in QUANTILES), "ratio",
               "device", "threads", "torch", "hflow_fast", "commit", "date"]  # fmt: skip
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    where = [device_name(device), torch.get_num_threads(), torch.__version__, hflow_fast.__version__, commit(), now]
    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(t.case.op for t in timings):
        path = folder / f"{op}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(columns)
            for t in timings:
                if t.case.op == op:
                    times = [f"{value:.1f}" for value in (*t.ours, *t.theirs)]
                    writer.writerow([op, t.case.name, t.case.work, *times, f"{t.ratio:.2f}", *where])


def commit() -> str:
    """The commit of the working tree that is timed, "+" where it has changes; the build's where there is no git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return build_info().get("git_commit", "unknown")
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
