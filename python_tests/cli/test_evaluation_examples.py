"""The example scripts for evaluation and studies."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[2] / "examples"


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images / 255.0, 8).flatten(1)


def run_example(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_evaluate(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.jit.save(torch.jit.script(Means()), tmp_path / "means.pt")
    run_example(monkeypatch, "evaluate.py", run, data, tmp_path / "likely.png", "--n", 14, "--extractor",
                tmp_path / "means.pt")
    output = capsys.readouterr().out
    assert "bits/dim on 8 images" in output and "FID" in output
    assert (tmp_path / "likely.png").is_file() and any((tmp_path / "cache").rglob("*.safetensors"))


def test_studies(run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_example(monkeypatch, "studies.py", run, data, tmp_path, "--pick", "1", "--draws", 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "study_randomize.png", "study_zero_finest.png", "study_zero_coarsest.png", "study_hold_coarse.png",
        "study_hold_fine.png", "study_seeds.png", "study_walk.gif"}
