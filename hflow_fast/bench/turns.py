"""Timing whole works of several sides in turn, and the memory of a process: for the programs in ``benchmarks/``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .measure import QUANTILES

__all__ = ["clock", "quantiles", "resident", "time_in_turn"]


def clock(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def time_in_turn(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, warm_up: int, settle: bool = False
) -> dict[str, list[float]]:
    """Seconds of every side, ``repeats`` times, one after the other, after ``warm_up`` calls of each.

    With ``settle``, each side's turn begins with a call that is not timed, for what is done many times in a row: the
    side before has left caches, and a processor's clock and AMX unit, as suited itself.
    """
    for function in functions.values():
        for _ in range(warm_up):
            clock(function, device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if settle:
                clock(function, device)
            times[name].append(clock(function, device))
    return times


def quantiles(values: Sequence[float]) -> list[float]:
    """The 20, 50 and 80 % quantiles."""
    if len(values) == 1:
        return list(values) * len(QUANTILES)
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    return [hundredths[q - 1] for q in QUANTILES]


def resident(field: str) -> float:
    """MiB of this process, "VmRSS" now or "VmHWM" at the peak; unlike getrusage's, it does not begin with the parent's.

    Raises:
        SystemExit: The system does not report it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"the system does not report {field} in /proc/self/status; leave memory out of what is measured.")
