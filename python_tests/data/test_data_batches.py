"""The order of training images, and going on with it after a restart."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from hflow_fast.data import Batches
from hflow_fast.errors import DatasetError


def take(batches: Batches, count: int) -> torch.Tensor:
    return torch.stack(list(itertools.islice(batches, count)))


def test_an_epoch_visits_each_image_at_most_once():
    batches = Batches(10, 3, seed=4)
    epochs = [take(batches, 3).flatten() for _ in range(3)]
    for number, epoch in enumerate(epochs):
        assert len(epoch.unique()) == 9 and epoch.dtype == torch.int64
        assert epoch.min() >= 0 and epoch.max() < 10
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert (batches.epoch, batches.position) == (2, 9)


def test_all_images_come_when_they_fill_the_batches():
    assert take(Batches(12, 4), 3).flatten().sort().values.tolist() == list(range(12))


def test_the_seed_decides_the_order():
    assert torch.equal(take(Batches(50, 7, seed=1), 20), take(Batches(50, 7, seed=1), 20))
    assert not torch.equal(take(Batches(50, 7, seed=1), 1), take(Batches(50, 7, seed=2), 1))


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7])
def test_a_restart_goes_on_exactly(done: int):
    straight = Batches(10, 3, seed=5)
    expected = take(straight, done + 8)[done:]
    first = Batches(10, 3, seed=5)
    list(itertools.islice(first, done))
    second = Batches(10, 3, seed=99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(take(second, 8), expected)
    assert second.state_dict() == straight.state_dict()


def test_what_a_caller_does_to_a_batch_stays_with_the_caller():
    changed, plain = Batches(6, 3), Batches(6, 3)
    next(changed).fill_(0)
    next(plain)
    assert torch.equal(next(changed), next(plain))


@pytest.mark.parametrize(("count", "batch_size"), [(3, 4), (3, 0), (0, 1)])
def test_too_few_images(count: int, batch_size: int):
    with pytest.raises(DatasetError, match=f"a batch of {batch_size} cannot be drawn from {count}"):
        Batches(count, batch_size)


def test_the_state_of_another_dataset_is_refused():
    with pytest.raises(DatasetError, match="the order of 10 images cannot go on with 11"):
        Batches(11, 3).load_state_dict(Batches(10, 3).state_dict())
