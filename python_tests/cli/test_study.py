from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import hflow_fast
from .test_train import assert_one_line_error

IMAGES = ("randomize", "zero", "hold")


@pytest.mark.parametrize(
    ("study", "options"),
    [
        ("randomize", ("--draws", 2, "--pick", "1")),
        ("zero", ()),
        ("zero", ("--from", "coarsest", "--pick", "0,2")),
        ("hold", ("--draws", 2, "--pick", "0")),
        ("hold", ("--draws", 2, "--pick", "0", "--keep", "fine", "--std", "0.5,0.7")),
        ("seeds", ("--seeds", "3,4", "--stds", "0.2,1")),
    ],
)
def test_pictures(run: Path, data: Path, tmp_path: Path, study: str, options: tuple[object, ...]) -> None:
    out = tmp_path / "new" / "picture.png"
    images = (data,) if study in IMAGES else ()
    result = hflow_fast("study", study, run, *images, "--out", out, "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    assert str(out) in result.output and len(np.unique(np.asarray(Image.open(out)))) > 10
    again = hflow_fast("study", study, run, *images, "--out", out)
    assert again.exit_code == 2 and "already exists" in again.output


def test_the_picture_of_the_samples_seeds(run: Path, tmp_path: Path) -> None:
    """The columns are what ``sample`` draws."""
    assert hflow_fast("study", "seeds", run, "--seeds", 7, "--stds", 0.4, "--out", tmp_path / "a.png").exit_code == 0
    assert hflow_fast("sample", run, "--n", 1, "--seed", 7, "--std", 0.4, "--out", tmp_path / "b").exit_code == 0
    grid, sample = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b/000000.png"))
    assert np.abs(grid[-98:-2, -98:-2] - sample.repeat(6, axis=0).repeat(6, axis=1)).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_film(run: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"walk.{suffix}"
    result = hflow_fast("study", "walk", run, "--out", out, "--frames", 3, "--count", 2, "--steps", "0,1,0.5")
    assert result.exit_code == 0 and "2 walks of 3 frames" in result.output, result.output
    assert out.stat().st_size > 500
    if suffix == "gif":
        assert Image.open(out).n_frames == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zero", "RUN", "nothing", "--out", "a.png"), ["nothing", "no such file"]),
        (("zero", "RUN", "DATA", "--out", "a.jpg"), [".png"]),
        (("zero", "RUN", "DATA", "--out", "a.png", "--pick", "0,8"), ["no image 8", "8 given"]),
        (("zero", "RUN", "DATA", "--out", "a.png", "--pick", "x"), ["--pick", "commas"]),
        (("hold", "RUN", "DATA", "--out", "a.png", "--std", "1,1,1,1"), ["--std"]),
        (("seeds", "RUN", "--out", "a.png", "--stds", "-1"), ["--stds", "at least 0"]),
        (("walk", "RUN", "--out", "a.png"), [".mp4 or .gif"]),
        (("walk", "RUN", "--out", "a.gif", "--steps", "0,1"), ["--steps", "3"]),
        (("walk", "RUN", "--out", "a.gif", "--steps", "2"), ["--steps", "at most 1"]),
        (("walk", "nowhere", "--out", "a.gif"), ["nowhere"]),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run, "DATA": data}
    result = hflow_fast("study", *(places.get(word, word) for word in arguments))
    assert_one_line_error(result, *words)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_an_image_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.png").write_text("not an image")
    result = hflow_fast("study", "zero", run, tmp_path / "folder", "--out", tmp_path / "a.png")
    assert_one_line_error(result, "notes.png", "--pick")
