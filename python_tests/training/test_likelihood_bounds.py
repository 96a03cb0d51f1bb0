"""Likelihood bounds of single images and the intervals of their mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hflow_fast.metrics import Bounds, bits_per_dim, evaluation_indices
from hflow_fast.training import Ranks, likelihood_bounds
from .tiny import SIZE, TinyFlow


@pytest.fixture
def model() -> TinyFlow:
    torch.manual_seed(0)
    return TinyFlow(noise=0.05).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (7, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def bounds(model: TinyFlow, images: Tensor, **options: object) -> Bounds:
    return likelihood_bounds(model, images, torch.arange(len(images)), **{"batch_size": 3} | options)


@pytest.mark.parametrize("bits", [8, 4])
def test_draws_average_to_the_expected_bound(model: TinyFlow, images: Tensor, bits: int) -> None:
    draws = bounds(model, images, bits=bits, draws=200)
    assert draws.total.shape == (200, 7) and draws.total.dtype == torch.float64
    centre = ((images >> (8 - bits)).double() + 0.5) / 2**bits - 0.5
    shift, scale = (model.encoder + model.decoder).double(), model.log_scale.double().exp()
    variance = 1 / (12 * 4**bits) + model.noise**2
    nats = 0.5 * (((centre - shift) * scale).square() + variance * scale.square() + math.log(2 * math.pi))
    expected = bits_per_dim((nats - model.log_scale.double()).sum((1, 2, 3)).detach(), model.dims, bits)
    error = draws.total.std(dim=0) / 200**0.5
    assert ((draws.total.mean(dim=0) - expected).abs() < 5 * error).all() and (error > 0).all()


def test_intervals(model: TinyFlow, images: Tensor) -> None:
    many = bounds(model, images, draws=50)
    total, levels = many.estimates()
    per_image = many.total.mean(dim=0)
    assert total.mean == pytest.approx(float(per_image.mean()))
    assert total.half_width == pytest.approx(1.959964 * float(per_image.std()) / 7**0.5, rel=1e-6)
    # The mean over images and one draw scatters by what the interval says is due to noise.
    assert 50**0.5 * total.noise_half_width == pytest.approx(1.959964 * float(many.total.mean(dim=1).std()), rel=0.4)
    assert list(levels) == [str(SIZE)] and levels[str(SIZE)].mean == pytest.approx(total.mean, abs=1e-4)
    once, _ = bounds(model, images[:1]).estimates()
    assert math.isfinite(once.mean) and math.isnan(once.half_width) and math.isnan(once.noise_half_width)


def test_noise_depends_on_seed_draw_and_batch_alone(model: TinyFlow, images: Tensor) -> None:
    first = bounds(model, images, draws=2)
    torch.rand(5)
    assert torch.equal(bounds(model, images, draws=3).total[:2], first.total)
    assert (bounds(model, images, seed=1).total != first.total[:1]).all() and (first.total[0] != first.total[1]).all()
    same = bounds(model, images[:1].expand(6, -1, -1, -1)).total[0]
    assert len(set(same.tolist())) == 6  # not the same noise in every batch


def test_images_are_those_of_the_indices_and_are_counted(model: TinyFlow, images: Tensor) -> None:
    counts: list[int] = []
    chosen = likelihood_bounds(model, images, torch.tensor([4, 5, 6]), batch_size=2, draws=2, progress=counts.append)
    assert counts == [2, 1, 2, 1]
    assert torch.equal(chosen.total, bounds(model, images[4:], batch_size=2, draws=2).total)


def test_processes_share_the_batches(model: TinyFlow, images: Tensor) -> None:
    gathered: list[object] = []

    class Rank(Ranks):
        def gather(self, value: object) -> list[object]:
            gathered.append(value)
            return gathered

    for rank in (1, 2):
        with pytest.raises(KeyError):  # not everything is there yet
            bounds(model, images, draws=2, ranks=Rank(rank, 3))
    shared, alone = bounds(model, images, draws=2, ranks=Rank(0, 3)), bounds(model, images, draws=2)
    assert [len(part) for part in gathered] == [2, 2, 2] and torch.equal(shared.total, alone.total)
    assert torch.equal(shared.levels[str(SIZE)], alone.levels[str(SIZE)])


def test_the_choice_of_images() -> None:
    assert evaluation_indices(5, 9).tolist() == evaluation_indices(5, 5).tolist() == [0, 1, 2, 3, 4]
    chosen = evaluation_indices(100, 10)
    assert len(set(chosen.tolist())) == 10 and chosen.tolist() == sorted(evaluation_indices(100, 10).tolist())
    assert chosen.tolist() != list(range(10))
