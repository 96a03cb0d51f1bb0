"""Steps captured in CUDA graphs. What does not need a GPU is tested in test_graph.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from torch import Tensor

from hflow_fast._replay import WARM_UP
from hflow_fast.bench.activity import device_activity
from hflow_fast.data import ImageDataset
from hflow_fast.inference import draw_samples
from hflow_fast.inference.graphs import replayed
from hflow_fast.models import HFlow, Noise
from hflow_fast.models.building import build_model
from hflow_fast.training import RunDirectory, Trainer

from .tiny import tiny_config

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
MOST_KERNELS = 2500  # of a micro-batch of A-128, of which a step has four
PRESETS = pytest.mark.parametrize("preset, optimizer", [("tiny-16", "adam"), ("glow-tiny-16", "adamax")])


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """cuDNN's algorithms without atomics, the same with and without a graph."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before


@pytest.fixture
def make(dataset_16: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(cuda_graph: str, preset: str = "tiny-16", **general: Any) -> Trainer:
        torch.manual_seed(0)
        config = tiny_config(CUDA_GRAPH=cuda_graph, **general)  # 3 steps are an epoch
        run = RunDirectory.create(tmp_path / f"{cuda_graph}{len(list(tmp_path.iterdir()))}", config)
        trainer = Trainer(build_model(preset), ImageDataset.open(dataset_16), run, config, DEVICE)
        trainer.initialize()
        return trainer

    return make


def assert_close(trainer: Trainer, other: Trainer) -> None:
    for ours, theirs in ((trainer.model, other.model), (trainer.average, other.average)):
        for (name, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")


def test_a_captured_step_gives_the_same_numbers(make: Callable[..., Trainer]) -> None:
    """Noise and data of every pass, decays, the average's weight, frozen encoders; captured again where it has to be."""
    schedule = {"LEARNING_RATE_DECAY_START": 0, "LEARNING_RATE_CUT_ENCODERS": 4}
    plain, graphed = make("off", **schedule), make("on", **schedule)
    recorded = []
    for _ in range(18):
        expected, result = plain.step(), graphed.step()
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(result.gradient_norm, expected.gradient_norm, rtol=1e-2, atol=1e-3)
        recorded.append(graphed._replay.is_recorded)
    assert_close(graphed, plain)
    # Epoch 0 is too short for a graph; from epoch 1 on the average has its weight; in epoch 4 the encoders stop.
    assert recorded == [*[False] * (3 + WARM_UP), *[True] * (9 - WARM_UP), *[False] * WARM_UP, *[True] * (6 - WARM_UP)]


@pytest.mark.parametrize("settings", [
    {"preset": "glow-tiny-16", "OPTIMIZER": "adamax", "WARMUP_EPOCHS": 2},
    {"SAMPLES_PER_GRAD_EVAL": 8, "MERGE_BATCHES": 2, "ADDED_NOISE_STD": 0.05},
    {"SAMPLES_PER_GRAD_EVAL": 8, "MERGE_BATCHES": 3, "ADDED_NOISE_STD": 0.05},
], ids=["glow", "pairs of passes", "three of four passes"])  # fmt: skip
def test_replays_follow_the_step(make: Callable[..., Trainer], settings: dict[str, Any]) -> None:
    """Glow's Adamax the number of steps and the warmed-up rate; merged passes their noise, each its own."""
    plain, graphed = make("off", EMA_WEIGHT=1.0, **settings), make("on", EMA_WEIGHT=1.0, **settings)
    for _ in range(WARM_UP + 5):
        expected, result = plain.step(), graphed.step()
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-3, atol=1e-4)
    assert graphed._replay.is_recorded
    assert_close(graphed, plain)


@PRESETS
def test_a_replay_does_not_wait_for_the_device(make: Callable[..., Trainer], preset: str, optimizer: str) -> None:
    trainer = make("on", preset, EMA_WEIGHT=1.0, OPTIMIZER=optimizer)
    for _ in range(WARM_UP + 2):
        trainer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [trainer.step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer._replay.is_recorded
    assert all(torch.isfinite(result.loss) and not result.skipped for result in results)


@PRESETS
def test_the_average_is_seen_to_change(make: Callable[..., Trainer], preset: str, optimizer: str) -> None:
    trainer = make("on", preset, EMA_WEIGHT=1.0, OPTIMIZER=optimizer)
    x = torch.rand(2, 3, 16, 16, device=DEVICE) - 0.5
    for _ in range(WARM_UP + 3):
        trainer.step()
        with torch.no_grad():
            log_det = trainer.average.encode(x)[1]
        torch.testing.assert_close(log_det, trainer.average.encode(x)[1].detach(), rtol=1e-4, atol=1e-2)


def test_what_cannot_be_captured_is_done_as_it_stands(make, caplog, monkeypatch) -> None:
    plain, trainer = make("off"), make("auto")
    loss = trainer.model.loss

    def waiting(x: Tensor) -> Tensor:
        result = loss(x)
        float(result.sum())
        return result

    monkeypatch.setattr(trainer.model, "loss", waiting)
    with caplog.at_level(logging.WARNING):
        for _ in range(3 + WARM_UP + 3):
            expected, result = plain.step(), trainer.step()
            torch.testing.assert_close(result.loss, expected.loss, rtol=1e-3, atol=1e-4)
    assert_close(trainer, plain)
    assert ["training: no CUDA graph" in record.message for record in caplog.records] == [True]


@torch.no_grad()
def test_sampling_and_encoding_from_graphs() -> None:
    torch.manual_seed(0)
    model = HFlow.from_config("tiny-16").to(DEVICE)
    model.initialize(torch.rand(16, 3, 16, 16, device=DEVICE) - 0.5)
    model.eval()
    encode = replayed(model, model.encode)
    for _ in range(WARM_UP + 3):
        x = torch.rand(4, 3, 16, 16, device=DEVICE) - 0.5
        (latents, log_det), (expected, expected_log_det) = encode(x), model.encode(x)
        torch.testing.assert_close(log_det, expected_log_det, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    samples = draw_samples(model, 2 * (WARM_UP + 3), std=0.8, seed=0, batch_size=2)  # the last from a graph
    alone = torch.cat([draw_samples(model, [index], std=0.8, seed=0) for index in range(2 * (WARM_UP + 3))])
    assert (samples.int() - alone.int()).abs().max() <= 1


def test_few_kernels_for_a_micro_batch() -> None:
    """As it is trained where memory allows it: the four of a step in one pass."""
    torch.manual_seed(0)
    model = HFlow.from_config("A-128").to(DEVICE)
    x = torch.rand(16, 3, 128, 128, device=DEVICE) - 0.5
    model.initialize(x)
    model.train()
    noise = Noise([torch.Generator(DEVICE) for _ in range(4)])
    with model.prepared():
        model.loss(x, noise).mean().backward()
        count = device_activity(lambda: model.loss(x, noise).mean().backward()).kernels
    assert 0 < count <= 4 * MOST_KERNELS, count
