from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hflow_fast.data import ImageDataset
from hflow_fast.training import load_model, save_checkpoint

from .conftest import hflow_fast
from .test_train import assert_one_line_error


def test_there_and_back(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "latents.safetensors"
    result = hflow_fast("encode", run, data, "--part", "held-out", "--out", out, "--batch-size", 3)
    assert result.exit_code == 0, result.output
    held_out = ImageDataset.open(data).held_out
    count = len(held_out)
    assert f"latents of {count} images. Decoded again, {count} come back bit for bit" in result.output
    assert all(f"{name}: max error " in result.output for name in held_out.names)
    result = hflow_fast("decode", run, out, "--out", tmp_path / "decoded")
    assert result.exit_code == 0 and f"{count} images" in result.output, result.output
    files = sorted((tmp_path / "decoded").iterdir())
    assert len(files) == count
    decoded = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(decoded, held_out[:].numpy())


def test_mistakes(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20), (90, 10, 10)).save(folder / "a.png")
    (folder / "b.txt").write_text("not an image")
    out = tmp_path / "latents.safetensors"
    result = hflow_fast("encode", run, folder, folder / "a.png", "--out", out)
    assert result.exit_code == 0 and "skipped b.txt: not an image" in result.output, result.output
    assert "latents of 2 images" in result.output
    model, config = load_model(run)
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, config, model)
    for arguments, words in (
        (("encode", run, folder, "--out", out), [str(out), "already exists"]),
        (("encode", run, folder / "b.txt", "--out", tmp_path / "x.safetensors"), ["b.txt", "not an image"]),
        (("encode", run, tmp_path / "no", "--out", tmp_path / "x.safetensors"), ["no such file"]),
        (("encode", run, "--out", tmp_path / "x.safetensors"), ["IMAGES"]),
        (("decode", run, tmp_path / "no", "--out", tmp_path / "x"), ["no such file"]),
        (("decode", run, folder / "a.png", "--out", tmp_path / "x"), ["a.png", "damaged"]),
        (("decode", run, out, "--out", folder), [str(folder), "not empty"]),
        (("decode", other, out, "--out", tmp_path / "x"), [str(run), str(other), "the model that encoded them"]),
    ):
        assert_one_line_error(hflow_fast(*arguments), *words)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.safetensors").exists()
