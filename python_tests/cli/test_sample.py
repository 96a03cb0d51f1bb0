from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import hflow_fast
from .test_train import assert_one_line_error


def sample(checkpoint: Path, out: Path, *options: object) -> np.ndarray:
    result = hflow_fast("sample", checkpoint, "--out", out, "--n", 3, "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    return np.stack([np.asarray(Image.open(out / f"{index:06d}.png")) for index in range(3)])


def test_images_and_grid(run: Path, tmp_path: Path) -> None:
    images = sample(run, tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "000000.png", "000001.png", "000002.png", "grid.png", "samples.json"]
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert grid.shape == (2 * 98 + 2, 2 * 98 + 2, 3)
    for index, (top, left) in enumerate([(2, 2), (2, 100), (100, 2)]):
        enlarged = images[index].repeat(6, axis=0).repeat(6, axis=1)  # 16 pixels to 96
        np.testing.assert_array_equal(grid[top:top + 96, left:left + 96], enlarged)
    assert (grid[100:196, 100:196] == 255).all()


def test_the_seed_decides(run: Path, tmp_path: Path) -> None:
    first = sample(run, tmp_path / "a", "--seed", 5)
    file = run / "checkpoints" / "latest.safetensors"
    np.testing.assert_array_equal(first, sample(file, tmp_path / "b", "--seed", 5))
    assert (first != sample(run, tmp_path / "c", "--seed", 6)).any()
    assert (first != sample(run, tmp_path / "d", "--seed", 5, "--std", 0.1)).any()


def test_last_weights_instead_of_their_average(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path / "a", "--no-ema")


def test_std_per_level(run: Path, tmp_path: Path) -> None:
    same = sample(run, tmp_path / "a", "--std", 0.5)
    np.testing.assert_array_equal(same, sample(run, tmp_path / "b", "--std", "0.5,0.5"))
    np.testing.assert_array_equal(same, sample(run, tmp_path / "c", "--std", "0.5,0.5,1"))
    assert (same != sample(run, tmp_path / "d", "--std", "0.5,0.5,0")).any()
    for wrong in ("0.5,0.5,1,1", "high", "-1", "0.5,", "nan", "inf"):
        assert_one_line_error(hflow_fast("sample", run, "--out", tmp_path / "e", "--std", wrong), "--std")
    assert not (tmp_path / "e").exists()


def test_the_same_command_goes_on(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = sample(run, out)
    (out / "000001.png").unlink()
    np.testing.assert_array_equal(images, sample(run, out))
    more = hflow_fast("sample", run, "--out", out, "--n", 5)
    assert more.exit_code == 0 and "2 images drawn, 5 in all" in more.output
    assert_one_line_error(hflow_fast("sample", run, "--out", out, "--seed", 1), str(out), "seed 0 instead of 1")


def test_processes_of_torchrun(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sample(run, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = hflow_fast("sample", run, "--out", tmp_path / "two", "--n", 3)
    assert result.exit_code == 0 and "2 images drawn by process 1 of 2, 3 in all" in result.output
    assert not (tmp_path / "two" / "grid.png").exists()
    monkeypatch.setenv("RANK", "0")
    np.testing.assert_array_equal(images, sample(run, tmp_path / "two"))
    assert (tmp_path / "two" / "grid.png").read_bytes() == (tmp_path / "one" / "grid.png").read_bytes()


@pytest.mark.parametrize("name", ["nothing", "text.safetensors"])
def test_bad_checkpoints(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    out = tmp_path / "out"
    assert_one_line_error(hflow_fast("sample", tmp_path / name, "--out", out), name)
    assert not out.exists()


def test_existing_images_are_kept(run: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"mine")
    assert_one_line_error(hflow_fast("sample", run, "--out", tmp_path), str(tmp_path), "not empty")
    assert (tmp_path / "grid.png").read_bytes() == b"mine"
