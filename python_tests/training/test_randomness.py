from __future__ import annotations

import itertools

import torch

from hflow_fast.training.randomness import Use, seed_generators

CPU = torch.device("cpu")


def draw(seed: int, use: Use, *place: int) -> float:
    seed_generators(CPU, seed, use, *place)
    return torch.rand((), dtype=torch.float64).item()


def test_every_place_has_its_own_numbers_and_always_the_same() -> None:
    places = list(itertools.product((0, 1, 2**63 - 1), Use, range(4), range(3)))
    values = [draw(seed, use, step, number) for seed, use, step, number in places]
    assert len(set(values)) == len(values)
    torch.rand(5)
    assert values == [draw(seed, use, step, number) for seed, use, step, number in places]
