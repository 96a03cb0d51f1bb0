"""What a GPU does during a piece of work: for the programs in ``benchmarks/``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["Activity", "activity_of", "device_activity"]

_WORK = "work of device_activity"
_WAITS = frozenset({"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"})


class Activity(NamedTuple):
    """Of one piece of work; see :func:`device_activity`."""

    busy: float
    """Share of the time from the first kernel's start to the last one's end in which any ran, 0 to 1."""
    kernels: int
    """Kernels, copies and fills."""
    kernel_ms: float
    """The sum of their times: more than that of the work where they overlap."""
    waits: int
    """How often the host waited for the device before the work was launched."""


def device_activity(function: Callable[[], Any]) -> Activity:
    """What a CUDA device does during one call of ``function``, kernels of CUDA graphs included.

    The profiler makes kernels and the gaps between them somewhat longer than they are.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(_WORK):
            function()
        torch.cuda.synchronize()
    return activity_of(profiler.events())


def activity_of(events: Iterable[Any]) -> Activity:
    """The same from the profiler's events, with the call in a region named as above."""
    events = list(events)
    spans = sorted((event.time_range.start, event.time_range.end) for event in events
                   if event.device_type == DeviceType.CUDA and event.name != _WORK)  # the region is shown there, too
    calls = [event.time_range for event in events if event.device_type == DeviceType.CPU and event.name == _WORK]
    waits = sum(event.name in _WAITS and any(call.start <= event.time_range.start <= call.end for call in calls)
                for event in events)
    covered, end = 0.0, float("-inf")
    for start, stop in spans:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    length = end - spans[0][0] if spans else 0.0
    return Activity(covered / length if length else 0.0, len(spans), sum(stop - start for start, stop in spans) / 1e3,
                    waits)  # fmt: skip
