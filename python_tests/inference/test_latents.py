from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hflow_fast import ConfigError, DatasetError
from hflow_fast.data import from_uint8
from hflow_fast.inference import LatentFiles, decode_to_folder, encode_to_file, open_images, read_image
from hflow_fast.inference.images import read_png, save_png
from hflow_fast.models import HFlow


@pytest.fixture
def folder(images: torch.Tensor, tmp_path: Path) -> Path:
    """Five images, 0.png … 4.png, and a file that is none."""
    path = tmp_path / "images"
    path.mkdir()
    for index, image in enumerate(images):
        save_png(image, path / f"{index}.png")
    (path / "3b.txt").write_text("not an image")
    return path


def rewrite(path: Path, **changes: str | None) -> None:
    """Changes metadata of a safetensors file; None removes them."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@torch.no_grad()
def test_round_trip(model: HFlow, images: torch.Tensor, folder: Path, tmp_path: Path, batch_size: int) -> None:
    out = tmp_path / "latents.safetensors"
    done = encode_to_file(model, [folder], out, batch_size=batch_size, model_name="here")
    assert done.files == [out] and [image.name for image in done.images] == [f"{index}.png" for index in range(5)]
    assert [name for name, _ in done.skipped] == ["3b.txt"]
    assert all(image.exact and 0 < image.mean_error < image.max_error < 0.2 for image in done.images)

    tensors = load_file(out)
    latents, log_det = model.encode(from_uint8(images))
    assert sorted(tensors) == [*(f"latent.{level}" for level in range(3)), "log_det", "max_error", "mean_error"]
    for level, latent in enumerate(latents):
        torch.testing.assert_close(tensors[f"latent.{level}"], latent, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors["log_det"], log_det, rtol=1e-5, atol=1e-3)
    assert tensors["max_error"].tolist() == [image.max_error for image in done.images]

    files = LatentFiles(out)
    assert files.names == [f"{index}.png" for index in range(5)] and files.model_name == "here" and len(files) == 5
    assert [len(batch[0]) for batch in files.batches(2)] == [2, 2, 1]
    assert decode_to_folder(model, out, tmp_path / "decoded", batch_size=batch_size) == 5
    names = [f"{index:06d}_{index}.png" for index in range(5)]
    assert sorted(path.name for path in (tmp_path / "decoded").iterdir()) == names
    assert torch.equal(torch.stack([read_png(tmp_path / "decoded" / name) for name in names]), images)
    assert out.stat().st_mode == (folder / "3b.txt").stat().st_mode


def test_errors_are_those_of_the_model(model: HFlow, folder: Path, tmp_path: Path) -> None:
    """A decoder that is off by 3 steps in one pixel and by half a step everywhere else."""

    class Off(HFlow):
        def decode(self, latents):
            x, log_det = super().decode(latents)
            x = x + 0.6 / 256
            x[:, 0, 0, 0] += 2.4 / 256
            return x, log_det

    off = Off(model.config).eval()
    off.load_state_dict(model.state_dict())
    done = encode_to_file(off, [folder / "2.png"], tmp_path / "off.safetensors")
    image, = done.images
    assert not image.exact and image.max_error == pytest.approx(3, abs=0.1)
    assert image.mean_error == pytest.approx(0.6 + 2.4 / 768, abs=0.05)


def test_several_files(model: HFlow, images: torch.Tensor, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents.safetensors"
    done = encode_to_file(model, [folder], out, images_per_file=2, batch_size=3)
    assert [path.name for path in done.files] == [f"latents-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert not out.exists()
    for path in (out, tmp_path / "latents.safetensors.index.json"):
        files = LatentFiles(path)
        assert files.names == [f"{index}.png" for index in range(5)]
    assert decode_to_folder(model, out, tmp_path / "decoded") == 5
    decoded = [read_png(path) for path in sorted((tmp_path / "decoded").iterdir())]
    assert torch.equal(torch.stack(decoded), images)
    assert LatentFiles(done.files[1]).names == ["2.png", "3.png"]

    with pytest.raises(ConfigError, match="already exists"):
        encode_to_file(model, [folder], out)
    (tmp_path / "latents.safetensors.index.json").unlink()  # an encoding that was interrupted
    with pytest.raises(DatasetError, match="no such file"):
        LatentFiles(out)
    with pytest.raises(ConfigError, match="already exists"):
        encode_to_file(model, [folder], out)


def test_a_file_without_images_among_several(model: HFlow, folder: Path, tmp_path: Path) -> None:
    done = encode_to_file(model, [folder], tmp_path / "latents.safetensors", images_per_file=1)
    assert len(done.files) == 5 and len(LatentFiles(tmp_path / "latents.safetensors")) == 5


def test_all_kinds_of_places(model: HFlow, images: torch.Tensor, folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "1.png", "deep/1.png")
    data = tmp_path / "data"
    data.mkdir()
    pixels = images[2:].permute(0, 2, 3, 1).numpy()
    np.save(data / "images.npy", pixels)
    recipe = {"source_fingerprint": "", "resolution": 16, "split": "content", "held_out_fraction": 0.25, "seed": 0}
    (data / "dataset.json").write_text(json.dumps({
        "recipe": recipe, "source": "made up", "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "names": ["c", "d", "e"], "held_out": [1], "skipped": []}))
    wide = tmp_path / "wide.jpg"
    Image.new("L", (64, 32), 77).save(wide)
    for part, names in (("all", ["c", "e", "d"]), ("train", ["c", "e"]), ("held-out", ["d"])):
        with open_images([folder / "0.png", archive, wide, data], 16, part=part) as source:
            assert source.names == ["0.png", "deep/1.png", "wide.jpg", *names]
            (_, batch), = source.batches(range(len(source)), 16)
        order = {"c": 2, "d": 3, "e": 4}
        assert torch.equal(batch[:2], images[:2])
        assert (batch[2] == 77).all()
        assert torch.equal(batch[3:], images[[order[name] for name in names]])
    with pytest.raises(DatasetError, match="16 px, the model's 32 px"), open_images([data], 32):
        pass
    assert [image.exact for image in encode_to_file(model, [data], tmp_path / "z.safetensors").images] == [True] * 3


def test_images_that_cannot_be_read(model: HFlow, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(folder / "3b.txt", text)
    for place, words in ((folder / "3b.txt", "3b.txt: not an image"), (tmp_path / "no", "no such file"),
                         (empty, "no images"), (text, "none of 1 files is an image")):
        with pytest.raises(DatasetError, match=words):
            encode_to_file(model, [place], out)
        assert not out.exists()
    for path in (folder / "3b.txt", tmp_path / "no", empty):
        with pytest.raises(DatasetError, match=path.name):
            read_image(path, 16)
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        encode_to_file(model, [folder], tmp_path / "latents.bin")


def test_another_model_is_refused_by_name(model: HFlow, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents.safetensors"
    encode_to_file(model, [folder], out, model_name="runs/one")
    torch.manual_seed(5)
    with pytest.raises(DatasetError, match=r"runs/one \(weights \w{12}\), which is not runs/two \(weights \w{12}\)"):
        decode_to_folder(HFlow.from_config("tiny-16"), out, tmp_path / "decoded", model_name="runs/two")
    assert not (tmp_path / "decoded").exists()
    (tmp_path / "decoded").mkdir()
    (tmp_path / "decoded" / "mine").touch()
    with pytest.raises(ConfigError, match="not empty"):
        decode_to_folder(model, out, tmp_path / "decoded")


def test_damaged_files(model: HFlow, folder: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    encode_to_file(model, [folder], good)

    def broken(name: str) -> Path:
        return Path(shutil.copy(good, tmp_path / f"{name}.safetensors"))

    torn = broken("torn")
    torn.write_bytes(good.read_bytes()[:-100])
    foreign = broken("foreign")
    rewrite(foreign, format="pt")
    nameless = broken("nameless")
    rewrite(nameless, names=None)
    no_list = broken("no_list")
    rewrite(no_list, names="{")
    index = tmp_path / "list.safetensors.index.json"
    for path, words in ((torn, "damaged"), (foreign, "not latents"), (nameless, "metadata"), (no_list, "metadata"),
                        (tmp_path / "none", "no such file"), (folder, "no such file")):
        with pytest.raises(DatasetError, match=words):
            LatentFiles(path)
    for content in ("[", "[]", '{"files": ["../good.safetensors"]}', "{}"):
        index.write_text(content)
        with pytest.raises(DatasetError, match="index"):
            LatentFiles(index)

    short = broken("short")
    rewrite(short, names='["one"]')
    with pytest.raises(DatasetError, match="latents of 1 images"):
        decode_to_folder(model, short, tmp_path / "short")
    tensors = load_file(good)
    with safe_open(good, framework="pt") as file:
        save_file({name: tensor for name, tensor in tensors.items() if name != "latent.1"}, tmp_path / "less.safetensors",
                  file.metadata())
    with pytest.raises(DatasetError, match="shapes"):
        decode_to_folder(model, tmp_path / "less.safetensors", tmp_path / "less")


def test_names_stay_in_the_folder(model: HFlow, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents.safetensors"
    encode_to_file(model, [folder], out)
    rewrite(out, names=json.dumps(["../../up.png", "/etc/x\n", "a/b/c.d.jpg", "..", "n" * 300]))
    decode_to_folder(model, out, tmp_path / "decoded")
    assert sorted(path.name for path in (tmp_path / "decoded").iterdir()) == [
        "000000_up.png", "000001_x_.png", "000002_c.d.png", "000003_...png", f"000004_{'n' * 100}.png"]
