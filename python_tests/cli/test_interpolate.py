from __future__ import annotations

import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from .conftest import hflow_fast
from .test_train import assert_one_line_error


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    """A red and a blue image, of other formats and sizes than the model's."""
    paths = tmp_path / "red.jpg", tmp_path / "blue.webp"
    for path, colour in zip(paths, ((200, 40, 40), (40, 40, 200))):
        Image.new("RGB", (50, 40), colour).save(path, quality=95)
    return paths


def strip(path: Path, count: int) -> np.ndarray:
    """The frames of a strip, (count, 16, 16, 3)."""
    picture = np.asarray(Image.open(path)).astype(int)
    assert picture.shape == (100, 98 * count + 2, 3)
    return np.stack([picture[2:98:6, 98 * index + 2:98 * index + 98:6] for index in range(count)])


def test_first_image_first(run: Path, ends: tuple[Path, Path], tmp_path: Path) -> None:
    for space in ("z", "y"):
        out = tmp_path / "new" / f"{space}.png"
        result = hflow_fast("interpolate", run, *ends, "--out", out, "--frames", 4, "--space", space)
        assert result.exit_code == 0 and "red.jpg → " in result.output and "4 frames" in result.output, result.output
        frames = strip(out, 4)
        assert np.abs(frames[0] - (200, 40, 40)).max() <= 6 and np.abs(frames[-1] - (40, 40, 200)).max() <= 6


def test_seeds_and_the_way_back(run: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        assert hflow_fast("sample", run, "--out", tmp_path / str(seed), "--n", 1, "--seed", seed).exit_code == 0
    out = tmp_path / "way.png"
    result = hflow_fast("interpolate", run, "--seeds", 1, 2, "--out", out, "--frames", 3, "--loop", "--mode", "slerp")
    assert result.exit_code == 0 and "seed 1 → seed 2 and back" in result.output, result.output
    frames = strip(out, 4)
    for index, seed in ((0, 1), (2, 2)):
        sample = np.asarray(Image.open(tmp_path / str(seed) / "000000.png")).astype(int)
        assert np.abs(frames[index] - sample).max() <= 1
    np.testing.assert_array_equal(frames[1], frames[3])


def test_videos(run: Path, tmp_path: Path) -> None:
    for name in ("way.mp4", "way.gif"):
        result = hflow_fast("interpolate", run, "--seeds", 1, 2, "--out", tmp_path / name, "--frames", 5, "--fps", 10)
        assert result.exit_code == 0, result.output
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "way.mp4")) == (5, 0.5)
    with Image.open(tmp_path / "way.gif") as gif:
        assert gif.n_frames == 5 and gif.info["duration"] == 100


def test_mistakes(run: Path, ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    out = tmp_path / "out.gif"
    for arguments, words in (
        ((*ends, "--out", tmp_path / "way.avi"), [".mp4, .gif or .png"]),
        ((ends[0], text, "--out", out), ["text.png", "not an image"]),
        ((ends[0], tmp_path / "no.png", "--out", out), ["no.png", "No such file"]),
        ((ends[0], "--out", out), ["two images"]),
        ((*ends, ends[0], "--out", out), ["two images"]),
        ((*ends, "--seeds", 1, 2, "--out", out), ["two images"]),
        (("--out", out), ["two images"]),
        ((*ends, "--out", text), ["text.png", "already exists"]),
        (("--seeds", 1, 2, "--std", "1,2,3,4,5", "--out", out), ["--std"]),
        ((*ends, "--frames", 1, "--out", out), ["--frames"]),
    ):
        assert_one_line_error(hflow_fast("interpolate", run, *arguments), *words)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    result = hflow_fast("interpolate", run, *ends, "--out", tmp_path / "way.mp4")
    assert_one_line_error(result, "pip install 'hflow_fast[video]'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blue.webp", "red.jpg", "text.png"]
    assert text.read_text() == "not an image"
