"""The scripts in examples/ run on a trained model and make what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """``example("sample", *arguments)`` runs a script as a user does, in this process."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_sample(example, run: Path, tmp_path: Path) -> None:
    example("sample", run, tmp_path / "samples.png")
    assert size(tmp_path / "samples.png") == (8 * 98 + 2, 5 * 98 + 2)


def test_interpolate(example, run: Path, tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "green")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / name)
    example("interpolate", run, tmp_path / "a.png", tmp_path / "b.png", tmp_path / "ways.png", tmp_path / "way.gif",
            "--frames", 4)
    assert size(tmp_path / "ways.png") == (8 * 98 + 2, 3 * 98 + 2)
    with Image.open(tmp_path / "way.gif") as film:
        assert film.n_frames == 6 and film.size == (128, 128)


def test_encode_decode(example, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("encode_decode", run, data, tmp_path / "latents.safetensors", tmp_path / "round_trip.png")
    assert "images come back bit for bit" in capsys.readouterr().out
    assert size(tmp_path / "round_trip.png") == (8 * 98 + 2, 3 * 98 + 2)
