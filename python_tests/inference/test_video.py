from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Iterator

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from hflow_fast import ConfigError
from hflow_fast.inference import save_video


def ramp(count: int, height: int = 16, width: int = 16) -> Iterator[torch.Tensor]:
    """Frames that get brighter, the left half red and the right one blue."""
    for index in range(count):
        frame = torch.full((3, height, width), 20 + 20 * index, dtype=torch.uint8)
        frame[0, :, :width // 2] = 200
        frame[2, :, width // 2:] = 200
        yield frame


def read_mp4(path: Path) -> tuple[dict, np.ndarray]:
    frames = imageio_ffmpeg.read_frames(str(path))
    properties = next(frames)
    width, height = properties["size"]
    return properties, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])


def test_mp4_plays_in_browsers(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    save_video(ramp(8), path, fps=10)
    properties, frames = read_mp4(path)
    assert properties["codec"] == "h264" and properties["pix_fmt"].startswith("yuv420p") and properties["fps"] == 10
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert len(frames) == 8 and frames.shape[1:] == (256, 256, 3)
    for frame, given in zip(frames, ramp(8)):
        expected = given.permute(1, 2, 0).numpy().repeat(16, axis=0).repeat(16, axis=1)
        assert np.abs(frame.astype(int) - expected)[:, 8:-8].mean() < 4
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_odd_sides_and_one_frame(tmp_path: Path) -> None:
    save_video(ramp(1, 271, 301), tmp_path / "odd.mp4")
    _, frames = read_mp4(tmp_path / "odd.mp4")
    assert frames.shape == (1, 272, 302, 3)


@pytest.mark.parametrize(("fps", "delay"), [(10, 100), (24, 40), (100, 20)])
def test_gif(tmp_path: Path, fps: float, delay: int) -> None:
    save_video(ramp(5), tmp_path / "film.GIF", fps=fps)
    with Image.open(tmp_path / "film.GIF") as picture:
        assert picture.format == "GIF" and picture.n_frames == 5 and picture.info["loop"] == 0
        assert picture.info["duration"] == delay and picture.size == (256, 256)
        for index, given in enumerate(ramp(5)):
            picture.seek(index)
            expected = given.permute(1, 2, 0).numpy().repeat(16, axis=0).repeat(16, axis=1)
            assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_whole_or_not_at_all(tmp_path: Path, suffix: str) -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield from ramp(3)
        raise RuntimeError("no more")

    path = tmp_path / f"film.{suffix}"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError, match="no more"):
        save_video(failing(), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"before"
    with pytest.raises(ValueError, match="no frames"):
        save_video([], path)


def test_an_encoder_that_fails_at_the_end_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the disk is full: all frames were taken, but the file is cut off."""
    real = imageio_ffmpeg.write_frames

    def torn(path: str, *arguments: object, **options: object) -> Iterator[None]:
        try:
            yield from real(path, *arguments, **options)
        finally:
            with open(path, "r+b") as file:
                file.truncate(500)

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", torn)
    with pytest.raises(OSError, match="disk full"):
        save_video(ramp(4), tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


def test_frames_are_taken_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, sent = itertools.count(), []

    def writer(*arguments: object, **options: object) -> Iterator[None]:
        while True:
            yield
            sent.append(next(taken))

    def counted() -> Iterator[torch.Tensor]:
        for frame in ramp(6):
            assert next(taken) == 2 * len(sent)
            yield frame

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", writer)
    with pytest.raises(OSError):  # nothing was written
        save_video(counted(), tmp_path / "film.mp4")
    assert sent == [1, 3, 5, 7, 9, 11]


def test_names_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Iterator[torch.Tensor]:
        pytest.fail("frames were made although they cannot be written")
        yield

    for name in ("film.avi", "film"):
        with pytest.raises(ConfigError, match=r"\.mp4 or \.gif"):
            save_video(never(), tmp_path / name)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ConfigError, match=r"pip install 'hflow_fast\[video\]'"):
        save_video(never(), tmp_path / "film.mp4")
    save_video(ramp(2), tmp_path / "film.gif")
