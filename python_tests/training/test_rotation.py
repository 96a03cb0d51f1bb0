from __future__ import annotations

import os
from pathlib import Path

import pytest

from hflow_fast.errors import CheckpointError
from hflow_fast.training.rotation import checkpoint_files, keep_checkpoint


def save(folder: Path, step: int, count: int | None = 3, *, best: bool = False) -> None:
    """As training does: a new file takes the place of the latest one."""
    (folder / "new").write_text(str(step))
    os.replace(folder / "new", folder / "latest.safetensors")
    keep_checkpoint(folder, step, count, best=best)


def contents(folder: Path) -> dict[str, str]:
    return {path.name.removesuffix(".safetensors"): path.read_text() for path in sorted(folder.iterdir())}


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (0, 5, 9, 10, 123456789):
        save(tmp_path, step, best=step == 5)
    assert contents(tmp_path) == {"best": "5", "latest": "123456789", "step_00000009": "9", "step_00000010": "10",
                                  "step_123456789": "123456789"}
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "latest.safetensors", "step_123456789.safetensors", "step_00000010.safetensors", "step_00000009.safetensors"]
    assert (tmp_path / "latest.safetensors").samefile(tmp_path / "step_123456789.safetensors")


@pytest.mark.parametrize("count", [None, 0])
def test_all_are_kept(tmp_path: Path, count: int | None) -> None:
    for step in range(6):
        save(tmp_path, step, count)
    assert len(checkpoint_files(tmp_path)) == 1 + 6


def test_repeating_changes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 1)
        for _ in range(2):
            keep_checkpoint(tmp_path, 1, 3, best=True)
    assert contents(tmp_path) == {"best": "1", "latest": "1", "step_00000001": "1"}


def test_other_files_and_later_steps_are_left_alone(tmp_path: Path) -> None:
    mine = ["step_1.txt", "step_00000001.safetensors.bak", "step_old.safetensors", "step_00000900.safetensors"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    for step in range(5):  # training has gone back to before step 900
        save(tmp_path, step, 1)
    assert {name for name, text in contents(tmp_path).items() if text == "mine"} == {
        name.removesuffix(".safetensors") for name in mine}
    assert [name for name, text in contents(tmp_path).items() if text != "mine"] == ["latest", "step_00000004"]


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    for step in range(4):
        save(tmp_path, step, 2, best=step == 0)
    assert contents(tmp_path) == {"best": "0", "latest": "3", "step_00000002": "2", "step_00000003": "3"}


def test_a_failure_leaves_the_latest_and_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 0, 1)
    (tmp_path / "latest.safetensors").write_text("1")
    os.unlink(tmp_path / "step_00000000.safetensors")
    (tmp_path / "step_00000000.safetensors").write_text("0")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hflow_fast._files.os.replace", fail)
    with pytest.raises(CheckpointError, match="latest.safetensors: saved, but.*No space left"):
        keep_checkpoint(tmp_path, 1, 1, best=True)
    assert contents(tmp_path) == {"latest": "1", "step_00000000": "0"}
