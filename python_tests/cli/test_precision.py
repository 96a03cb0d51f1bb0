"""--precision, from training to decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hflow_fast.inference import LatentFiles
from hflow_fast.models import HFlow

from .conftest import hflow_fast


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What models are told, in order."""
    told: list[str | None] = []
    original = HFlow.set_precision

    def set_precision(self, precision, **options):
        told.append(precision)
        return original(self, precision, **options)

    monkeypatch.setattr(HFlow, "set_precision", set_precision)
    return told


def test_training_in_bf16_is_configured_and_can_be_changed(data: Path, tmp_path: Path, precisions) -> None:
    run = tmp_path / "run"
    common = ("--run", run, "--device", "cpu")
    result = hflow_fast("train", "--config", "tiny-16", "--data", data, "--steps", 1, "--batch-size", 4, "--precision",
                        "bf16", *common)
    assert result.exit_code == 0, result.output
    assert json.loads((run / "config.json").read_text())["GENERAL"]["PRECISION"] == "bf16"
    for options in ((), ("--precision", "fp32")):
        result = hflow_fast("train", "--resume", "--steps", 2 + len(options), *options, *common)
        assert result.exit_code == 0, result.output
    assert precisions == ["bf16", "bf16", "fp32"]


def test_latents_are_decoded_in_their_precision(data: Path, run: Path, tmp_path: Path, precisions) -> None:
    latents, out = tmp_path / "latents.safetensors", tmp_path / "images"
    result = hflow_fast("encode", run, data, "--part", "held-out", "--out", latents, "--precision", "bf16",
                        "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "8 come back bit for bit" in result.output
    assert LatentFiles(latents).precision == "bf16"
    assert {part.dtype for batch in LatentFiles(latents).batches(8) for part in batch} == {torch.float64}
    assert hflow_fast("decode", run, latents, "--out", out, "--device", "cpu").exit_code == 0
    assert precisions == ["bf16", "bf16"]
    assert hflow_fast("sample", run, "--out", tmp_path / "samples", "--n", 1, "--device", "cpu").exit_code == 0
    assert precisions[2:] == [None]
