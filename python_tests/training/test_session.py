from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hflow_fast.data import loader as loader_module
from hflow_fast.errors import CheckpointError, ConfigError
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
    with pytest.raises(TrainingError, match="20 steps in a row, up to step 25. All layers' outputs are finite, but the "
                                            "loss is not. The last good checkpoint is .*latest.safetensors, of step 0"):
        Session(trainer).run()
    records = [record for record in read_metrics(trainer.run.metrics) if "skipped_steps" in record]
    assert [record["step"] for record in records if record["skipped_steps"]] == [2, *range(6, 26)]
    assert all("loss" not in record for record in records if record["skipped_steps"])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert saved_step(trainer) == 0
    text = (trainer.run.path / "log.txt").read_text()
    assert text.count("1 of the steps since the last record were skipped") == 21 and "ended at step 25" in text


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


def intervals(trainer: Trainer, **output: Any) -> None:
    trainer.config = trainer.config.model_copy(update={"output": trainer.config.output.model_copy(update=output)})


def test_intervals_in_steps(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=7)
    intervals(trainer, checkpoint_every_steps=4, visualization_every_steps=3, metrics_every_steps=2, keep_checkpoints=0)
    Session(trainer).run()
    steps = [record["step"] for record in read_metrics(trainer.run.metrics) if "held_out_bits_per_dim" in record]
    assert steps == [2, 3, 4, 6, 7]
    assert [path.name for path in sorted(trainer.run.samples.iterdir())] == [
        f"step_0000000{step}.png" for step in (3, 6, 7)]
    saves = [path.name for path in sorted(trainer.run.checkpoint.parent.glob("step_*"))]
    assert {"step_00000000.safetensors", "step_00000004.safetensors", "step_00000007.safetensors"} <= set(saves)


def test_a_save_that_was_cut_off_before_the_best_was_named_is_finished(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "keep", lambda *arguments, **options: None)
    trainer = make_trainer(tmp_path / "run", STEPS=2)
    Session(trainer).run()
    assert not trainer.run.best.exists()
    monkeypatch.undo()
    trainer = make_trainer(tmp_path / "run", STEPS=2)
    Session(trainer)._find_best()  # the session's end would name it anew
    assert read_checkpoint(trainer.run.best).notes["step"] == 2


def test_the_best_is_kept_and_found_again(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = {2: 5.0, 4: 4.0, 6: 4.5, 8: 4.2, 10: 3.9}

    def session(steps: int) -> dict[str, Any]:
        trainer = make_trainer(tmp_path / "run", STEPS=steps)
        intervals(trainer, visualization_every_steps=2)
        monkeypatch.setattr(session_module, "held_out_bits_per_dim",
                            lambda *_, **__: {"held_out_bits_per_dim": bounds[trainer.step_count]})
        Session(trainer).run()
        return read_checkpoint(trainer.run.best).notes

    assert session(6) == {"step": 4, "held_out_bits_per_dim": 4.0}
    assert session(8) == {"step": 4, "held_out_bits_per_dim": 4.0}  # better than the last one, not than the best
    assert session(10) == {"step": 10, "held_out_bits_per_dim": 3.9}


def test_a_failed_save_is_tried_again(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full for a while: the save of step 3 fails, and that of step 5 is the second attempt."""
    trainer = make_trainer(tmp_path / "run", STEPS=9)
    intervals(trainer, checkpoint_every_steps=3, keep_checkpoints=0)
    monkeypatch.setattr(session_module, "_RETRY_SECONDS", 0.0)
    replace = os.replace

    def sometimes_full(source: Path, target: Path) -> None:
        if trainer.step_count in (3, 4):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes_full)
    assert Session(trainer).run() == "finished"
    assert sorted(path.name[5:13] for path in trainer.run.checkpoint.parent.glob("step_*")) == [
        "00000000", "00000005", "00000006", "00000009"]
    warnings = [line for line in capfd.readouterr().err.splitlines() if "No space left" in line]
    assert len(warnings) == 2 and all(line.startswith("WARNING: ") and "tried again" in line for line in warnings)


def test_the_log_tells_what_happened(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hflow-fast", "train", "--run", "my run"])
    Session(make_trainer(tmp_path / "run", STEPS=1)).run()
    Session(make_trainer(tmp_path / "run", STEPS=2, LEARNING_RATE=1e-3)).run()
    lines = [line.split(maxsplit=3)[3] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    path = tmp_path / "run"
    assert lines[0].startswith("hflow_fast 0.1.0, PyTorch ") and lines[0].endswith(": hflow-fast train --run 'my run'")
    assert lines[1:6] == [
        f"{path}: training starts", "step 0: checkpoint saved", lines[3], "step 1: checkpoint saved, the best so far",
        "finished at step 1, saved"]
    assert lines[7:10] == [
        f"{path}: training goes on at step 1, from latest.safetensors",
        "configuration changed: GENERAL.LEARNING_RATE: 0.005 → 0.001", "configuration changed: GENERAL.STEPS: 1 → 2"]


def test_a_log_that_cannot_be_written_is_loud_and_training_goes_on(
    tmp_path: Path, make_trainer: MakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=2)
    (trainer.run.path / "log.txt").symlink_to("/dev/full")
    assert Session(trainer).run() == "finished"
    assert "log.txt could not be written ([Errno 28] No space left on device)" in capfd.readouterr().err


def test_tensorboard_reads_numbers_and_pictures(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tmp_path / "run", STEPS=3)
    Session(trainer).run()
    events = EventAccumulator(str(trainer.run.tensorboard))
    events.Reload()
    records = [record for record in read_metrics(trainer.run.metrics) if "loss" in record]
    for name in ("loss", "gradient_norm", "learning_rate/flows"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (record["step"], pytest.approx(record[name])) for record in records]
    assert [event.step for event in events.Scalars("held_out_bits_per_dim")] == [3]
    for folder in (trainer.run.samples, trainer.run.reconstructions):
        (event,) = events.Images(folder.name)
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        np.testing.assert_array_equal(shown, np.asarray(Image.open(folder / "step_00000003.png")))


class Means(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_fid_where_there_is_an_extractor(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.jit.save(torch.jit.script(Means()), tmp_path / "means.pt")
    trainer = make_trainer(tmp_path / "run", STEPS=4, INCEPTION_NET_PATH=str(tmp_path / "means.pt"))
    intervals(trainer, metrics_every_steps=2, visualization_every_steps=3, fid_n_samples=12)
    Session(trainer).run()
    fids = {record["step"]: record["fid"] for record in read_metrics(trainer.run.metrics) if "fid" in record}
    assert list(fids) == [2, 4] and all(0 < value < 1e6 for value in fids.values())

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_module, "measure_fid", fail)
    trainer = make_trainer(tmp_path / "run", STEPS=5, INCEPTION_NET_PATH=str(tmp_path / "means.pt"))
    assert Session(trainer).run() == "finished"
    assert "step 5: no FID ([Errno 28] No space left" in capfd.readouterr().err


def test_an_extractor_that_does_not_work_is_refused_at_once(
    tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run", INCEPTION_NET_PATH=str(tmp_path / "nothing.pt"))
    with pytest.raises(CheckpointError, match="nothing.pt"):
        Session(trainer)
    monkeypatch.setattr("hflow_fast.training.fid.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"INCEPTION_NET_PATH.*pip install 'hflow_fast\[fid\]'"):
        Session(trainer)
