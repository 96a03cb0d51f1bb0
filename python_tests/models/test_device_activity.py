"""What is read from the profiler about a GPU, on events made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from hflow_fast.bench.activity import activity_of, device_activity

WORK = "work of device_activity"


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))


def test_overlaps_count_once_and_gaps_do_not():
    found = activity_of([
        event(WORK, 0, 50, DeviceType.CPU), event(WORK, 90, 201),
        event("second", 120, 140), event("first", 100, 130), event("inside the first", 105, 110),
        event("copy", 150, 200), event("cudaLaunchKernel", 10, 12, DeviceType.CPU),
    ])  # fmt: skip
    assert found == (pytest.approx(0.9), 4, pytest.approx(0.105), 0)


def test_waits_of_the_work_alone_count():
    found = activity_of([
        event(WORK, 10, 50, DeviceType.CPU), event("kernel", 20, 40),
        event("cudaStreamSynchronize", 15, 30, DeviceType.CPU), event("cudaMemcpy", 45, 60, DeviceType.CPU),
        event("cudaMemcpyAsync", 31, 32, DeviceType.CPU), event("cudaDeviceSynchronize", 51, 70, DeviceType.CPU),
    ])  # fmt: skip
    assert found == (1.0, 1, pytest.approx(0.02), 2)


def test_nothing_at_all():
    assert activity_of([]) == (0.0, 0, 0.0, 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_of_a_device():
    x = torch.ones(1024, 1024, device="cuda")
    waiting = device_activity(lambda: float((x @ x).sum()))
    assert waiting.waits >= 1 and waiting.kernels >= 3 and 0 < waiting.busy <= 1
    assert device_activity(lambda: x @ x).waits == 0
