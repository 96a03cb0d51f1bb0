"""The scripts in examples/ run on a trained model and make what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

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


def test_manipulate(example, run: Path, tmp_path: Path) -> None:
    for name, colours in (("red", ("red", "darkred")), ("blue", ("blue", "navy"))):
        (tmp_path / name).mkdir()
        for number, colour in enumerate(colours):
            Image.new("RGB", (20, 20), colour).save(tmp_path / name / f"{number}.png")
    example("manipulate", run, tmp_path / "red", tmp_path / "blue", tmp_path / "blue", tmp_path / "picture.png")
    assert size(tmp_path / "picture.png")[0] == 5 * 98 + 2


def test_encode_decode(example, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("encode_decode", run, data, tmp_path / "latents.safetensors", tmp_path / "round_trip.png")
    assert "images come back bit for bit" in capsys.readouterr().out
    assert size(tmp_path / "round_trip.png") == (8 * 98 + 2, 3 * 98 + 2)


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images / 255.0, 8).flatten(1)


def test_evaluate(
    example, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.jit.save(torch.jit.script(Means()), tmp_path / "means.pt")
    example("evaluate", run, data, tmp_path / "likely.png", "--n", 14, "--extractor", tmp_path / "means.pt")
    output = capsys.readouterr().out
    assert "bits/dim on 8 images" in output and "FID" in output
    assert size(tmp_path / "likely.png")[1] == 2 * 98 + 2 and any((tmp_path / "cache").rglob("*.safetensors"))


def test_studies(example, run: Path, data: Path, tmp_path: Path) -> None:
    example("studies", run, data, tmp_path, "--pick", "1", "--draws", 2, "--frames", 3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "study_randomize.png", "study_zero_finest.png", "study_zero_coarsest.png", "study_hold_coarse.png",
        "study_hold_fine.png", "study_seeds.png", "study_walk.gif"}
