"""``hflow-fast dataset`` as its users meet it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hflow_fast.cli import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    before = signal.getsignal(signal.SIGTERM)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["dataset", *arguments])

    yield invoke
    signal.signal(signal.SIGTERM, before)


def test_make_then_find_again(run):
    first = run("images", "out", "--resolution", "4")
    assert (first.exit_code, first.stdout) == (0, "out: made, 4 training and 1 held-out images of 4 × 4\n")
    again = run("images", "out", "--resolution", "4")
    assert (again.exit_code, again.stdout) == (0, "out: already there, 4 training and 1 held-out images of 4 × 4\n")


def test_a_file_of_the_original(run):
    with h5py.File("old.hdf5", "w") as file:
        for seed, name in enumerate(("birds", "faces")):
            pixels = np.random.default_rng(seed).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
            file.create_group(name)["X_DATA"] = pixels
    result = run("old.hdf5", "out", "--resolution", "4", "--name", "faces")
    assert (result.exit_code, result.stdout) == (0, "out: made, 5 training and 1 held-out images of 4 × 4\n")
    np.testing.assert_array_equal(np.load("out/images.npy"), pixels)
    result = run("old.hdf5", "another", "--resolution", "4")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "Error: old.hdf5: it holds birds, faces; choose one with --name."


def test_skipped_files_are_listed(run):
    for i in range(25):
        Path(f"images/bad{i:02d}.txt").touch()
    result = run("images", "out", "--resolution", "4")
    lines = result.stderr.splitlines()
    assert result.exit_code == 0
    assert lines[0] == "skipped bad00.txt: not an image that Pillow can read"
    assert lines[20:] == ["… 25 skipped in all, listed in out/dataset.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.zip", "out", "--resolution", "4"], "nothing.zip: no such file or folder"),
        (["images/0.png", "out", "--resolution", "4"], "images/0.png: not a zip"),
        (["images", "images", "--resolution", "4"], "inside the source"),
        (["images", "out", "--resolution", "0"], "--resolution"),
        (["images", "out", "--resolution", "4", "--held-out", "1"], "--held-out"),
        (["images", "out"], "--resolution"),
    ],
)
def test_a_mistake_gives_one_clear_error(run, arguments: list[str], message: str):
    result = run(*arguments)
    assert result.exit_code == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("Error: ") and message in error and "Traceback" not in result.output
    assert not Path("out").exists()


def test_a_request_to_end_leaves_nothing_behind(run, monkeypatch: pytest.MonkeyPatch):
    def end(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("skipped")

    monkeypatch.setattr("hflow_fast.data.sources.decode_image", end)
    assert run("images", "out", "--resolution", "4").exit_code == 128 + signal.SIGTERM
    assert os.listdir() == ["images"]
