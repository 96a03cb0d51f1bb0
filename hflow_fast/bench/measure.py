"""How it is timed: all implementations of a case in turn, many times, in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .cases import Case, Function

__all__ = ["QUANTILES", "Timer", "Timing"]

QUANTILES = (20, 50, 80)  # %
_LARGE = 64 * 2**20  # bytes of the copy that measures the memory's bandwidth, read and written
_CALLS = {"eager": 1, "graph": 20}  # per timed function; so many in a CUDA graph that launching it does not count


@dataclass(frozen=True)
class Timing:
    """Microseconds per call, as quantiles (20, 50, 80 %), of every side of a case: ours, eager, compile, copy."""

    case: Case
    method: str
    """``eager``: called from Python; ``graph``: replayed from a CUDA graph."""
    sides: dict[str, tuple[float, ...]]
    notes: dict[str, str]
    """Why a side is missing."""
    bandwidth: float
    """GB/s, read and written, of a large copy."""

    def ratio(self, side: str) -> float | None:
        """How many times faster ours is, by medians."""
        return self.sides[side][1] / self.sides["ours"][1] if side in self.sides and "ours" in self.sides else None

    @property
    def floor(self) -> float:
        """Microseconds to move the case's bytes at the bandwidth of a large copy."""
        return self.case.bytes / self.bandwidth / 1e3


@dataclass
class Timer:
    """Times cases on a device.

    Every repeat takes each side in turn, over enough calls to last ``shortest`` seconds. Caches stay warm: below the
    cache's size a time is one of cached data, as between two layers.
    """

    device: torch.device
    repeats: int = 30
    compile: bool = True
    shortest: float = 1e-3
    bandwidth: float = field(init=False)

    def __post_init__(self) -> None:
        copy = _copy(2 * _LARGE, self.device)
        times = sorted(self._clock("eager", copy, 1) for _ in range(12))
        self.bandwidth = 2 * _LARGE / times[len(times) // 2] / 1e3

    def time(self, case: Case) -> Iterator[Timing]:
        """One timing; a second one, from CUDA graphs, on a GPU."""
        torch.compiler.reset()  # compiled code of earlier shapes would count against the limit of recompilations
        makers: dict[str, Callable[[], Function]] = {"ours": case.ours, "eager": case.eager}
        if self.compile:
            makers["compile"] = case.compiled
        makers["copy"] = lambda: _copy(case.bytes, self.device)
        for method in ("eager", "graph") if self.device.type == "cuda" else ("eager",):
            yield self._time(case, method, makers)

    def _time(self, case: Case, method: str, makers: dict[str, Callable[[], Function]]) -> Timing:
        functions: dict[str, Function] = {}
        calls, notes = {}, {}
        for side, make in makers.items():
            try:
                functions[side] = self._prepared(method, make())
                once = self._clock(method, functions[side], 3) * 1e-6
            except Exception as error:  # what a compiler or a capture cannot do is a result, not the end of the run
                if side in ("ours", "copy") or (side == "eager" and method == "eager"):
                    raise
                functions.pop(side, None)
                notes[side] = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:100]}"
                continue
            calls[side] = max(1, math.ceil(self.shortest / once / _CALLS[method]))
        samples: dict[str, list[float]] = {side: [] for side in functions}
        for _ in range(self.repeats):
            for side, function in functions.items():
                samples[side].append(self._clock(method, function, calls[side]))
        sides = {side: _quantiles(times) for side, times in samples.items()}
        return Timing(case, method, sides, notes, self.bandwidth)

    def _prepared(self, method: str, function: Function) -> Function:
        """Warmed up and, for the method "graph", captured."""
        if method == "eager":
            for _ in range(3):
                function()
            return function
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CALLS["graph"]):
                function()
        return graph.replay

    def _clock(self, method: str, function: Function, calls: int) -> float:
        """Microseconds of one call, averaged over ``calls`` of ``function``: by events on a GPU, waiting for it."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - begin) / calls * 1e6
        with torch.cuda.device(self.device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e3 / calls / _CALLS[method]


def _copy(size: int, device: torch.device) -> Function:
    """A copy that moves ``size`` bytes in all: half of them read, half written."""
    source = torch.ones(max(1, size // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _quantiles(times: Sequence[float]) -> tuple[float, ...]:
    if len(times) == 1:
        return tuple(times) * len(QUANTILES)
    percentiles = statistics.quantiles(times, n=100, method="inclusive")
    return tuple(percentiles[q - 1] for q in QUANTILES)
