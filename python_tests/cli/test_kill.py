"""Runs that SIGKILL ends, several times, and that end as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

from hflow_fast.configs import load_config
from hflow_fast.training import read_checkpoint, read_metrics

KILLED = Path(__file__).with_name("killed.py")
STEPS = 10


CPU = "--threads", "1", "--device", "cpu"


@pytest.fixture
def killed() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.stdin.close()


def train_until(server: subprocess.Popen[str], moment: str, count: int, *options: object) -> None:
    arguments = ["train", *map(str, options), *CPU]
    print(json.dumps({"moment": moment, "count": count, "arguments": arguments}), file=server.stdin, flush=True)
    assert int(server.stdout.readline()) == (0 if moment == "never" else -signal.SIGKILL)


def kill_when(file: Path, *options: object) -> None:
    """Trains with the unchanged program and kills it from outside as soon as ``file`` exists."""
    command = [sys.executable, "-m", "hflow_fast", "train", *map(str, options), *CPU]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not file.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record}


def bounds(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["held_out_bits_per_dim"])
            for record in read_metrics(run / "metrics.jsonl") if "held_out_bits_per_dim" in record]


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_run_killed_at_any_moment_ends_like_one_never_interrupted(
    data: Path, tmp_path: Path, killed: subprocess.Popen[str]
) -> None:
    config = load_config("tiny-16")
    config["GENERAL"] |= {"BATCH_SIZE": 2, "SAMPLES_PER_GRAD_EVAL": 4, "LEARNING_RATE_DECAY_START": 0,
                          "LEARNING_RATE_CUT_ENCODERS": 1, "EPOCHS": None, "HOURS": None, "STEPS": STEPS}
    config["MODEL_PARAMETERS"]["ENDBLOCK_SETTINGS"]["LAYERS"] = [1, 1]  # for speed
    config["OUTPUT"] = {"CHECKPOINT_EVERY_STEPS": 2, "VISUALIZATION_EVERY_STEPS": 3, "METRICS_EVERY_STEPS": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = "--config", tmp_path / "config.json", "--data", data, "--run"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    resume = "--run", parts, "--resume"

    train_until(killed, "never", 0, *start, whole)
    train_until(killed, "in_the_middle_of_writing", 1, *start, parts)  # of the very first checkpoint
    assert os.listdir(parts / "checkpoints") == [".latest.safetensors.tmp"]
    kill_when(parts / "checkpoints" / "step_00000002.safetensors", *resume)
    first_step = read_checkpoint(parts).notes["step"]
    for moment, count in (("in_a_step", 3), ("in_the_middle_of_writing", 2), ("before_the_new_one_takes_its_place", 1),
                          ("after_the_new_one_took_its_place", 1), ("never", 0)):
        train_until(killed, moment, count, *resume)

    state = "model", "average", "training"
    ours, expected = read_checkpoint(parts, *state), read_checkpoint(whole, *state)
    assert ours.notes == expected.notes and expected.notes["step"] == STEPS
    assert_same(ours.model, expected.model)
    assert_same(ours.average, expected.average)
    assert_same(ours.training["optimizer"]["state"], expected.training["optimizer"]["state"])
    for key in ("dataset", "batches"):
        assert ours.training[key] == expected.training[key]
    after_the_kill = {step: loss for step, loss in losses(whole).items() if step > first_step}
    assert len(after_the_kill) >= STEPS - 3
    assert after_the_kill.items() <= losses(parts).items()
    assert bounds(parts) == bounds(whole)
    folders = parts / "checkpoints", whole / "checkpoints"
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
    best = [read_checkpoint(folder / "best.safetensors", "average") for folder in folders]
    assert best[0].notes == best[1].notes
    assert_same(best[0].average, best[1].average)
