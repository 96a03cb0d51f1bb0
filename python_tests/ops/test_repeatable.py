"""The same bits from every operation, whatever the threads and the run."""

from __future__ import annotations

import pytest
import torch

from ._cases import run, same_bits_for_any_thread_count
from ._table import every_device, every_row


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@every_row
def test_same_bits_for_any_thread_count(row, memory):
    for call in row.large:
        assert same_bits_for_any_thread_count(row.function(call), row.inputs(call, torch.float32, memory)), call


@every_device
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@every_row
def test_same_bits_in_every_run(row, memory, device):
    for call in row.large:
        tensors = row.inputs(call, torch.float32, memory, device=device)
        first, second = (run(row.function(call), tensors) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), call


@every_device
@every_row
def test_storage_that_starts_anywhere(row, device):
    call = row.examples[0]
    tensors = row.inputs(call, torch.float32, device=device)
    moved = [t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in tensors]
    for ours, expected in zip(run(row.function(call), moved), run(row.function(call), tensors), strict=True):
        torch.testing.assert_close(ours, expected)
