from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch

from hflow_fast.data import ImageDataset
from hflow_fast.errors import ConfigError, DatasetError
from hflow_fast.training import TrainConfig, Trainer, optimizer
from hflow_fast.training.checks import check_dataset

from .tiny import tiny_config

MakeTrainer = Callable[..., Trainer]


def states(trainer: Trainer) -> list[torch.Tensor]:
    return [*trainer.model.state_dict().values(), *trainer.average.state_dict().values()]


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_resume_is_exact(tmp_path: Path, make_trainer: MakeTrainer, optimizer: str) -> None:
    """Losses and weights to the bit, across an epoch's end, a warm-up, a decay, and noise in data and model."""
    schedule = {"noise": 0.1, "LEARNING_RATE_DECAY_START": 0, "LEARNING_RATE_CUT_ENCODERS": 1, "OPTIMIZER": optimizer,
                "WARMUP_EPOCHS": 2}
    whole = make_trainer(tmp_path / "whole", **schedule)
    whole.initialize()
    expected = [whole.step().loss for _ in range(9)]

    first = make_trainer(tmp_path / "parts", **schedule)
    first.initialize()
    losses = [first.step().loss for _ in range(4)]
    first.save()
    first.step()  # lost, as after a crash
    second = make_trainer(tmp_path / "parts", **schedule)
    second.initialize()
    assert second.step_count == 4 and second.epoch == 1
    losses += [second.step().loss for _ in range(5)]

    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert all(torch.equal(a, b) for a, b in zip(states(second), states(whole), strict=True))


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    plain = {"ADDED_NOISE_STD": 0.0, "HORIZONTAL_FLIPS": False}
    models = []
    for batch_size in (1, 2, 4):
        trainer = make_trainer(tmp_path / str(batch_size), BATCH_SIZE=batch_size, **plain)
        trainer._passes.dequantize = lambda images: images / 255 - 0.5  # the noise would depend on the passes
        trainer.step()
        models.append(trainer.model)
    for model in models[1:]:
        for a, b in zip(models[0].parameters(), model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_every_pass_has_noise_of_its_own(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run", BATCH_SIZE=1)
    drawn: list[float] = []
    loss = trainer.model.loss
    trainer.model.loss = lambda x: (drawn.append(float(torch.rand(()))), loss(x))[1]
    for _ in range(2):
        trainer.step()
    assert len(drawn) == 8 == len(set(drawn))


def test_a_step_prepares_the_model_once(tmp_path: Path, make_trainer: MakeTrainer, monkeypatch) -> None:
    """And ends that before the gradients are used, since only then they are there."""
    trainer = make_trainer(tmp_path / "run")
    trainer.initialize()
    events = []

    @contextmanager
    def prepared() -> Iterator[None]:
        events.append("begin")
        yield
        events.append("end")

    def loss(x: torch.Tensor) -> torch.Tensor:
        events.append("pass")
        return type(trainer.model).loss(trainer.model, x)

    def clip_and_step(*arguments: Any) -> Any:
        events.append("step")
        return optimizer.clip_and_step(*arguments)

    monkeypatch.setattr(trainer.model, "prepared", prepared, raising=False)
    monkeypatch.setattr(trainer.model, "loss", loss)
    monkeypatch.setattr("hflow_fast.training.trainer.clip_and_step", clip_and_step)
    trainer.step()
    assert events == ["begin", "pass", "pass", "end", "step"]


def test_average_follows_exactly_in_epoch_0_and_slowly_later(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run")  # 3 steps are an epoch
    for _ in range(3):
        trainer.step()
        assert torch.equal(trainer.average.decoder, trainer.model.decoder)
    before = trainer.average.decoder.detach().clone()
    trainer.step()
    torch.testing.assert_close(trainer.average.decoder, torch.lerp(before, trainer.model.decoder.detach(), 0.005))
    assert not torch.equal(trainer.average.decoder, before)


def test_rates_warm_up_by_the_images_seen(tmp_path: Path, make_trainer: MakeTrainer) -> None:  # 12 images, 4 a step
    trainer = make_trainer(tmp_path / "run", WARMUP_EPOCHS=1.5)
    factors = [0, 4 / 18, 8 / 18, 12 / 18, 16 / 18, 1, 1]
    assert [trainer.learning_rates(step)["flows"] for step in range(7)] == pytest.approx([5e-3 * f for f in factors])
    before = copy.deepcopy(trainer.model.state_dict())
    for step, factor in enumerate(factors):
        trainer.step()
        assert [float(group["lr"]) for group in trainer._optimizer.param_groups] == pytest.approx(
            list(trainer.learning_rates(step).values()))
        moved = (trainer.model.decoder - before["decoder"]).abs().max()
        assert (moved == 0) == (step == 0) and moved < 2e-3 * sum(factors[:step + 1]) * 1.01 + 1e-12


def test_initialization_happens_once_and_reaches_the_average(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.initialize()
    assert trainer.average.initialized and torch.equal(trainer.average.encoder, trainer.model.encoder)
    trainer.step()
    weights = copy.deepcopy(trainer.model.state_dict())
    trainer.initialize()
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), trainer.model.state_dict().values()))


def test_datasets_that_do_not_fit(dataset: ImageDataset) -> None:
    def check(resolution: int, **general: int) -> None:
        check_dataset(dataset, resolution, TrainConfig.from_config(tiny_config(**general)).general)

    check(8, SAMPLES_PER_GRAD_EVAL=12, RESIZE_DATA_TO=8)
    with pytest.raises(DatasetError, match="8 px, the model's 16 px.*--resolution 16"):
        check(16)
    with pytest.raises(DatasetError, match=r"12 training images.*SAMPLES_PER_GRAD_EVAL \(14\)"):
        check(8, SAMPLES_PER_GRAD_EVAL=14)
    with pytest.raises(ConfigError, match="RESIZE_DATA_TO is 32.*images are of 8 px"):
        check(8, RESIZE_DATA_TO=32)


def test_another_dataset_cannot_go_on(tmp_path: Path, make_trainer: MakeTrainer, monkeypatch) -> None:
    make_trainer(tmp_path / "run").save()
    monkeypatch.setattr(ImageDataset, "fingerprint", "another")
    with pytest.raises(DatasetError, match="not the dataset this run was started with"):
        make_trainer(tmp_path / "run")


def test_a_run_killed_before_its_second_checkpoint_goes_on_exactly(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    whole = make_trainer(tmp_path / "run", noise=0.1)
    whole.initialize()
    whole.save()
    expected = [whole.step().loss for _ in range(3)]
    again = make_trainer(tmp_path / "run", noise=0.1)
    assert again.resumed_from == again.run.checkpoint and again.step_count == 0
    again.initialize()
    assert torch.equal(torch.stack([again.step().loss for _ in range(3)]), torch.stack(expected))


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    """In the second epoch, when the average differs from the model."""
    trainer = make_trainer(tmp_path / "run")
    for _ in range(4):
        trainer.step()
    before = copy.deepcopy(states(trainer)), copy.deepcopy(trainer._optimizer.state_dict()["state"])
    loss = trainer.model.loss
    trainer.model.loss = lambda x: loss(x) * float("nan")
    assert trainer.step().skipped and trainer.step_count == 5
    assert all(torch.equal(a, b) for a, b in zip(states(trainer), before[0], strict=True))
    torch.testing.assert_close(trainer._optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
    trainer.model.loss = loss
    trainer.step()
    assert not torch.equal(states(trainer)[0], before[0][0])


def test_a_skipped_step_is_repeated_exactly_to_be_diagnosed(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run", noise=0.1)
    loss, inputs = trainer.model.loss, []

    def record(x: torch.Tensor) -> torch.Tensor:
        inputs.append((x.clone(), torch.get_rng_state()))
        return loss(x)

    trainer.model.loss = record
    trainer.step()
    trainer.diagnose()
    half = len(inputs) // 2
    assert half == 2
    for (a, state_a), (b, state_b) in zip(inputs[:half], inputs[half:], strict=True):
        assert torch.equal(a, b) and torch.equal(state_a, state_b)


def test_changes_are_refused_before_anything_is_loaded(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    make_trainer(tmp_path / "run").save()
    assert make_trainer(tmp_path / "run", GRAD_CLIP=1.0).changes == ["GENERAL.GRAD_CLIP: 50.0 → 1.0"]
    with pytest.raises(ConfigError, match="GENERAL.SEED: 0 → 1"):
        make_trainer(tmp_path / "run", SEED=1)
