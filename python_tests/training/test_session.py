from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from PIL import Image

from hflow_fast.data import loader as loader_module
from hflow_fast.errors import CheckpointError
from hflow_fast.training import Session, Trainer, TrainingError, read_checkpoint, read_metrics
from hflow_fast.training import session as session_module
from hflow_fast.training.progress import Limits

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def log_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_LOG_SECONDS", 0.0)


def saved_step(trainer: Trainer) -> int:
    return read_checkpoint(trainer.run.path, "training").training["step"]


def test_a_run_leaves_its_record(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=5)
    assert Session(trainer).run() == "finished"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints", "config.json", "log.txt", "metrics.jsonl", "reconstructions", "samples", "tb"]
    records = read_metrics(trainer.run.metrics)
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5]
    assert records[-1]["held_out_bits_per_dim"] == pytest.approx(records[-1]["held_out_bits_per_dim/8"])
    assert 0 < records[-1]["held_out_bits_per_dim"] < 12
    assert saved_step(trainer) == 5
    for folder in (trainer.run.samples, trainer.run.reconstructions):
        assert Image.open(folder / "step_00000005.png").mode == "RGB"


def test_the_wait_for_images_is_recorded(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = loader_module._read
    monkeypatch.setattr(loader_module, "_read", lambda *arguments: time.sleep(0.1) or read(*arguments))
    trainer = make_trainer(tmp_path / "run", STEPS=3)
    Session(trainer).run()
    first, *_ = (record for record in read_metrics(trainer.run.metrics) if "loss" in record)
    assert 0.1 <= first["data_seconds"] < first["seconds"]


def test_training_lowers_the_loss(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=60)
    Session(trainer).run()
    losses = [record["loss"] for record in read_metrics(trainer.run.metrics) if "loss" in record]
    assert losses[-1] < losses[0] - 0.1


def test_evaluation_does_not_change_training(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    losses = []
    for interval in (1.0, 1e-9):
        trainer = make_trainer(tmp_path / str(interval), noise=0.1)
        trainer.config = trainer.config.model_copy(
            update={"output": trainer.config.output.model_copy(update={"visualization_every": interval})})
        Session(trainer).run()
        records = read_metrics(trainer.run.metrics)
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0] == losses[1]
    assert sum("held_out_bits_per_dim" in record for record in records) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(tmp_path: Path, make_trainer: MakeTrainer, number: signal.Signals) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=1000)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    step = trainer.step

    def step_with_signal():
        if trainer.step_count == 2:
            os.kill(os.getpid(), number)
        return step()

    trainer.step = step_with_signal
    assert Session(trainer).run() == number.name
    assert saved_step(trainer) == trainer.step_count == 3
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_failed_save_is_loud_and_training_goes_on(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=5)
    trainer.save()
    trainer.config = trainer.config.model_copy(
        update={"output": trainer.config.output.model_copy(update={"checkpoint_every": 1e-9})})
    save, failures = trainer.save, []

    def fail_before_the_end(*arguments: Any, **options: Any) -> None:
        if trainer.step_count < 5:
            failures.append(trainer.step_count)
            raise CheckpointError("latest: not saved (No space left on device).")
        save(*arguments, **options)

    trainer.save = fail_before_the_end
    assert Session(trainer).run() == "finished"
    assert failures == [0, 1, 2, 3, 4] and saved_step(trainer) == 5
    assert "WARNING: latest: not saved (No space left on device)" in capfd.readouterr().err


def test_a_failed_save_at_the_end_is_an_error(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=2)
    trainer.save()
    trainer.run.checkpoint.parent.chmod(0o500)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left on device"):
        Session(trainer).run()
    monkeypatch.undo()
    trainer.run.checkpoint.parent.chmod(0o700)
    assert saved_step(trainer) == 0
    assert sorted(os.listdir(trainer.run.checkpoint.parent)) == ["latest.safetensors", "step_00000000.safetensors"]


def test_full_disk_for_metrics_and_grids_is_loud_and_training_goes_on(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=2)
    full = lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    monkeypatch.setattr(session_module, "save_png", full)
    assert Session(trainer).run() == "finished"
    assert capfd.readouterr().err.count("step_00000002.png could not be written") == 2


def test_a_step_that_is_not_finite_is_counted_and_many_end_the_run(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=100)
    loss = trainer.model.loss
    trainer.model.loss = lambda x: loss(x) * (float("nan") if trainer.step_count in (1, *range(5, 100)) else 1.0)
    with pytest.raises(TrainingError, match="20 steps in a row, up to step 25"):
        Session(trainer).run()
    records = [record for record in read_metrics(trainer.run.metrics) if "skipped_steps" in record]
    assert [record["step"] for record in records if record["skipped_steps"]] == [2, *range(6, 26)]
    assert all("loss" not in record for record in records if record["skipped_steps"])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert saved_step(trainer) == 0


def test_metrics_of_a_resumed_run_are_in_order(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    Session(make_trainer(tmp_path / "run", STEPS=3)).run()
    later = [{"step": step, "loss": -1.0} for step in (4, 5)]  # of a session that crashed
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in later) + '{"step": 6, "lo')
    trainer = make_trainer(tmp_path / "run", STEPS=6)
    Session(trainer).run()
    losses = [(record["step"], record["loss"]) for record in read_metrics(trainer.run.metrics) if "loss" in record]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6] and all(loss != -1.0 for _, loss in losses)


def test_limits() -> None:
    limits = Limits(steps=10, seconds=100.0)
    assert not limits.reached(9, 99.0) and limits.reached(10, 0.0) and limits.reached(0, 100.0)
    assert limits.fraction(5, 20.0) == 0.5 and limits.fraction(1, 90.0) == 0.9 and limits.fraction(20, 0.0) == 1.0
    assert limits.seconds_left(5, 20.0, seconds_per_step=3.0) == 15.0
    assert limits.seconds_left(5, 90.0, seconds_per_step=3.0) == 10.0


def test_the_first_limit_counts(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    general = make_trainer(tmp_path / "run", EPOCHS=2, STEPS=100, HOURS=0.5).config.general
    assert Limits.from_config(general, steps_per_epoch=3) == Limits(6, 1800.0)
