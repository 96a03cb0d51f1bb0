"""Tensors of more than 2³¹ elements, whose offsets no 32-bit integer holds: `pytest -m huge`, with 24 GB free."""

from __future__ import annotations

import math

import pytest
import torch

from ._table import ROWS, every_device

pytestmark = pytest.mark.huge


@every_device
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("row", [row for row in ROWS if row.huge], ids=lambda row: row.name)
@torch.no_grad()
def test_every_sample_is_as_it_is_alone(row, memory, device):
    call, generator = row.huge, torch.Generator().manual_seed(0)
    assert math.prod(call.shapes[0]) > 2**31

    def filled(shape):
        if len(shape) != 4:
            return torch.randn(shape, generator=generator).to(device)
        layout = torch.channels_last if memory == "channels_last" else torch.contiguous_format
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=layout)
        pattern = torch.randn((1, *shape[1:]), generator=generator).to(device, torch.bfloat16, memory_format=layout)
        for b in range(shape[0]):
            torch.mul(pattern, 1 + b / 64, out=tensor[b : b + 1])
        return tensor

    tensors = [filled(shape) for shape in call.shapes]
    results = row.function(call)(*tensors)
    for b in (0, len(tensors[0]) // 2, len(tensors[0]) - 1):
        alone = row.function(call)(*(t[b : b + 1] if t.dim() == 4 else t for t in tensors))
        for ours, expected in zip(results, alone, strict=True):
            torch.testing.assert_close(ours[b : b + 1], expected)
