from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hflow_fast.data import ImageDataset
from hflow_fast.metrics import PixelGaussian
from hflow_fast.training import load_model
from hflow_fast.training.evaluation import held_out_bits_per_dim

from .conftest import hflow_fast
from .test_train import assert_one_line_error


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images / 255.0, 8).flatten(1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("network") / "means.pt"
    torch.jit.save(torch.jit.script(Means()), file)
    return file


def test_likelihood_beside_the_baselines(run: Path, data: Path, tmp_path: Path) -> None:
    record = tmp_path / "new" / "numbers.json"
    result = hflow_fast("evaluate", run, "--device", "cpu", "--json", record)
    assert result.exit_code == 0, result.output
    numbers = json.loads(record.read_text())
    model, _ = load_model(run)
    held_out = ImageDataset.open(data).held_out
    expected = held_out_bits_per_dim(model, held_out, torch.arange(8), batch_size=4)
    assert numbers["images"] == 8 and numbers["batch_size"] == 4
    assert numbers["bits_per_dim"]["mean"] == pytest.approx(expected["held_out_bits_per_dim"], rel=1e-6)
    assert numbers["bits_per_dim"]["half_width"] > 0 and numbers["bits_per_dim"]["noise_half_width"] is None
    for level, value in numbers["levels"].items():
        assert value["mean"] == pytest.approx(expected[f"held_out_bits_per_dim/{level}"], rel=1e-6)
        assert f"level {level}" in result.output
    gaussian = PixelGaussian.fit(ImageDataset.open(data).train).bits_per_dim(held_out)
    assert numbers["baselines"]["pixel_gaussian"]["mean"] == pytest.approx(float(gaussian.mean()))
    assert f"{float(gaussian.mean()):.4f}" in result.output and "8.0000" in result.output
    assert f"{expected['held_out_bits_per_dim']:.4f}" in result.output and "8 images are few" in result.output


def test_draws_choice_and_split(run: Path, data: Path, tmp_path: Path) -> None:
    record = tmp_path / "numbers.json"
    result = hflow_fast("evaluate", run, "--data", data, "--split", "train", "--n", 5, "--draws", 3, "--seed", 1,
                        "--batch-size", 5, "--json", record, "--no-ema")
    assert result.exit_code == 0, result.output
    numbers = json.loads(record.read_text())
    assert (numbers["split"], numbers["images"], numbers["draws"], numbers["seed"]) == ("train", 5, 3, 1)
    assert "5 of 32 train images" in result.output and "3 draws" in result.output
    assert 0 < numbers["bits_per_dim"]["noise_half_width"] < numbers["bits_per_dim"]["half_width"]


def test_fid_and_its_cache(run: Path, network: Path, tmp_path: Path) -> None:
    def fid(name: str) -> dict[str, object]:
        record = tmp_path / f"{name}.json"
        result = hflow_fast("evaluate", run, "--fid", network, "--fid-n", 20, "--fid-std", 0.5, "--cache",
                            tmp_path / "cache", "--json", record, "--n", 4)
        assert result.exit_code == 0, result.output
        assert "TorchScript is code" in result.output and "20 samples at std 0.5, 20 train images" in result.output
        return json.loads(record.read_text())["fid"]

    first = fid("first")
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    assert fid("second") == first and file.stat().st_mtime_ns == written
    assert (first["real"], first["generated"], first["features"]) == (20, 20, 12) and first["value"] > 0


def test_what_a_user_gets_wrong_is_one_line(run: Path, data: Path, network: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for index in range(4):
        Image.fromarray(np.full((32, 32, 3), 60 * index, np.uint8)).save(source / f"{index}.png")
    larger, record = tmp_path / "larger", tmp_path / "record.json"
    assert hflow_fast("dataset", source, larger, "--resolution", 32, "--held-out", 0.5).exit_code == 0
    description = json.loads((data / "dataset.json").read_text())
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "images.npy").symlink_to(data / "images.npy")
    (whole / "dataset.json").write_text(json.dumps(description | {"held_out": []}))
    (tmp_path / "taken.json").write_text("mine")
    for arguments, words in (
        (("--data", tmp_path / "nothing"), ["nothing", "no such dataset"]),
        (("--data", larger), ["32 px", "16 px", "--resolution 16"]),
        (("--data", whole), ["no held_out images", "--split"]),
        (("--fid", tmp_path / "none.pt"), ["none.pt", "TorchScript"]),
        (("--fid", data / "dataset.json"), ["dataset.json", "not a TorchScript file"]),
        (("--json", tmp_path / "taken.json"), ["taken.json", "already exists"]),
        (("--draws", 0), ["--draws"]),
    ):
        options = ("--json", record) if "--json" not in arguments else ()
        assert_one_line_error(hflow_fast("evaluate", run, *arguments, *options), *words)
        assert not record.exists()
    assert (tmp_path / "taken.json").read_text() == "mine"
