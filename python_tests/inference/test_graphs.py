"""Without a GPU, a tape of dispatched operations stands in for CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from training.recording import tape_recorder

from hflow_fast import _replay
from hflow_fast.data import from_uint8
from hflow_fast.inference.graphs import replayed


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch) -> None:
    monkeypatch.setattr(_replay, "WARM_UP", 1)


@torch.no_grad()
def test_replays_are_the_same_for_every_batch(model, images) -> None:
    """To the bit: of changing shapes, after the weights change, and with results that stay."""
    model, count, calls = copy.deepcopy(model), [], []
    new_recorder = tape_recorder(lambda: [])
    encode = replayed(model, lambda x: (calls.append(len(x)), model.encode(x))[1],
                      lambda: (count.append(1), new_recorder())[1])
    batches = [from_uint8(batch) for batch in images[torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]])]]
    results = [encode(x) for x in batches]
    assert len(calls) == 2  # once as it stands, once recorded
    for (latents, log_det), x in zip(results, batches):
        expected, expected_log_det = model.encode(x)
        assert torch.equal(log_det, expected_log_det) and all(map(torch.equal, latents, expected))

    next(model.parameters()).mul_(1.1)
    for x in [*batches, from_uint8(images[:1])]:
        (latents, log_det), (expected, expected_log_det) = encode(x), model.encode(x)
        assert torch.equal(log_det, expected_log_det) and all(map(torch.equal, latents, expected))
    assert len(count) == 2


def test_without_a_gpu_it_is_called_as_it_is(model, images) -> None:
    calls = []
    encode = replayed(model, lambda x: calls.append(len(x)))
    for _ in range(6):
        encode(from_uint8(images))
    assert calls == [5] * 6
