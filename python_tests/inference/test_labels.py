"""Classes of class-conditional models in every tool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hflow_fast.data import ImageDataset, create_dataset, from_uint8, to_uint8
from hflow_fast.errors import ConfigError
from hflow_fast.inference import (LatentFiles, decode_to_folder, draw_latents, draw_samples, encode_to_file,
                                  interpolate, latents_of, reconstruct, save_png, studies, write_samples)
from hflow_fast.inference.images import read_png
from hflow_fast.inference.labels import class_number
from hflow_fast.metrics import FeatureExtractor, fid_of_model
from hflow_fast.models import Glow, HFlow


def decode(model: Glow, latents: list[Tensor], labels: list[int]) -> Tensor:
    with torch.no_grad():
        return to_uint8(model.decode(latents, torch.tensor(labels))[0])


def test_samples_have_their_classes_in_turn(conditional: Glow) -> None:
    samples = draw_samples(conditional, 5, std=0.7, seed=2, labels=[2, 0], batch_size=2)
    latents = draw_latents(conditional, range(5), std=0.7, seed=2)
    expected = decode(conditional, latents, [2, 0, 2, 0, 2])
    assert (samples.int() - expected.int()).abs().max() <= 1
    assert (samples.int() - decode(conditional, latents, [0] * 5).int()).abs().max() > 1
    alone = draw_samples(conditional, [3], std=0.7, seed=2, labels=[2, 0])
    assert (alone[0].int() - samples[3].int()).abs().max() <= 1
    one = draw_samples(conditional, [4], std=0.7, seed=2, labels=2)
    assert (one[0].int() - samples[4].int()).abs().max() <= 1


def test_files_of_samples_say_their_classes(conditional: Glow, tmp_path: Path) -> None:
    write_samples(conditional, tmp_path, 3, std=0.7, seed=0, labels=[1, 2])
    expected = draw_samples(conditional, 3, std=0.7, seed=0, labels=[1, 2])
    found = torch.stack([read_png(tmp_path / f"{number:06d}.png") for number in range(3)])
    assert (found.int() - expected.int()).abs().max() <= 1
    assert json.loads((tmp_path / "samples.json").read_text())["labels"] == [1, 2]
    with pytest.raises(ConfigError, match=r"labels \[1, 2\] instead of \[1\]"):
        write_samples(conditional, tmp_path, 3, std=0.7, seed=0, labels=[1])


def test_samples_of_few_bits(glow: Glow, tmp_path: Path) -> None:
    fine, coarse = (draw_samples(glow, 3, std=0.7, seed=0, bits=bits) for bits in (8, 5))
    assert torch.equal(coarse, fine // 8 * 8) and (fine % 8).any()
    write_samples(glow, tmp_path, 1, std=0.7, seed=0, bits=5)
    assert (read_png(tmp_path / "000000.png") % 8 == 0).all()
    with pytest.raises(ConfigError, match="bits 5 instead of None"):
        write_samples(glow, tmp_path, 1, std=0.7, seed=0)
    with pytest.raises(ValueError, match="bits"):
        draw_samples(glow, 1, std=0.7, seed=0, bits=0)


@pytest.mark.parametrize(
    ("labels", "words"), [(None, "class-conditional.*0 to 2"), (3, "classes are 0 to 2"), (-1, "classes are 0 to 2"),
                          ([0, 3], "classes are 0 to 2"), ([], "no class")])
def test_wrong_classes_leave_no_folder(conditional: Glow, tmp_path: Path, labels: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        write_samples(conditional, tmp_path / "out", 4, std=0.7, seed=0, labels=labels)
    if labels != []:
        assert not (tmp_path / "out").exists()


def test_models_without_classes_take_none(glow: Glow, model: HFlow, images: Tensor) -> None:
    for flow in (glow, model):
        with pytest.raises(ConfigError, match="no classes"):
            latents_of(flow, images, 0)


def test_labels_of_images_and_their_number(conditional: Glow, images: Tensor) -> None:
    own = latents_of(conditional, images, [0, 1, 2, 1, 0])
    with torch.no_grad():
        for number, label in enumerate([0, 1, 2, 1, 0]):
            alone, _ = conditional.encode(from_uint8(images[number:number + 1]), torch.tensor([label]))
            for together, single in zip(own, alone):
                torch.testing.assert_close(together[number:number + 1], single, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="5 images"):
        latents_of(conditional, images, [0, 1])


def test_a_class_decides_the_last_latent_only(conditional: Glow, images: Tensor) -> None:
    first, second = (latents_of(conditional, images, label) for label in (0, 1))
    for finer, same in zip(first[:-1], second[:-1]):
        torch.testing.assert_close(finer, same)
    assert (first[-1] - second[-1]).abs().max() > 0.01


def test_interpolation_and_reconstruction_keep_the_class(conditional: Glow, images: Tensor) -> None:
    start, end = (latents_of(conditional, images[which], [1, 2]) for which in (slice(0, 2), slice(2, 4)))
    frames = list(interpolate(conditional, start, end, 5, labels=[1, 2], batch_size=4))
    assert torch.equal(frames[0], images[:2]) and torch.equal(frames[-1], images[2:4])
    middle = decode(conditional, [(a + b) / 2 for a, b in zip(start, end)], [1, 2])
    assert (frames[2].int() - middle.int()).abs().max() <= 1
    rows = reconstruct(conditional, from_uint8(images), [0, 1, 2, 1, 0]).unflatten(0, (-1, 5))
    assert torch.equal(rows[0], images) and torch.equal(rows[1], images)
    latents = latents_of(conditional, images, [0, 1, 2, 1, 0])
    top = decode(conditional, [torch.zeros_like(z) for z in latents[:-1]] + latents[-1:], [0, 1, 2, 1, 0])
    assert (rows[-1].int() - top.int()).abs().max() <= 1


def test_studies_have_one_class(conditional: Glow, images: Tensor) -> None:
    steps = studies.zero_levels(conditional, images[:2], label=1)
    assert torch.equal(steps[0], images[:2])
    nothing = [torch.zeros(1, *shape) for shape in conditional.latent_shapes]
    assert (steps[-1, 0].int() - decode(conditional, nothing, [1])[0].int()).abs().max() <= 1
    samples = studies.hold_levels(conditional, images[:1], draws=2, std=0.7, seed=1, label=2)
    fresh = draw_latents(conditional, range(2), std=0.7, seed=1)
    kept = [z.expand(2, -1, -1, -1) for z in latents_of(conditional, images[:1], 2)]
    assert (samples[0, 0].int() - decode(conditional, [fresh[0], *kept[1:]], [2, 2]).int()).abs().max() <= 1
    maps = studies.randomize_levels(conditional, images[:1], draws=2, label=0)
    assert maps.shape == (3, 1, 16, 16) and (maps.amax((1, 2, 3)) > 0).all()
    seeds = studies.seed_samples(conditional, [4], [0.5], label=1)
    assert (seeds[0, 0].int() - draw_samples(conditional, 1, std=0.5, seed=4, labels=1)[0].int()).abs().max() <= 1
    frame = next(studies.random_walk(conditional, frames=2, std=0.5, seed=3, label=1))
    other = next(studies.random_walk(conditional, frames=2, std=0.5, seed=3, label=2))
    assert (frame.int() - other.int()).abs().max() > 1


def test_latents_on_disk_keep_their_class(conditional: Glow, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        save_png(image, tmp_path / "images" / f"{number}.png")
    out = tmp_path / "latents.safetensors"
    with pytest.raises(ConfigError, match="class-conditional"):
        encode_to_file(conditional, [tmp_path / "images"], out)
    assert not out.exists()
    done = encode_to_file(conditional, [tmp_path / "images"], out, label=2, images_per_file=2, batch_size=2)
    assert len(done.files) == 3 and all(image.exact for image in done.images)
    assert LatentFiles(out).labels().tolist() == [2] * 5
    assert load_file(done.files[0])["labels"].tolist() == [2, 2]
    decode_to_folder(conditional, out, tmp_path / "back", batch_size=2)
    back = torch.stack([read_png(path) for path in sorted((tmp_path / "back").iterdir())])
    assert torch.equal(back, images)
    decode_to_folder(conditional, out, tmp_path / "other", label=0)
    other = torch.stack([read_png(path) for path in sorted((tmp_path / "other").iterdir())])
    assert (other.int() - decode(conditional, latents_of(conditional, images, 2), [0] * 5).int()).abs().max() <= 1


def dataset_of(images: Tensor, folder: Path) -> ImageDataset:
    """Of two classes in turn."""
    for number, image in enumerate(images):
        (folder / "source" / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        save_png(image, folder / "source" / f"class {number % 2}" / f"{number}.png")
    return create_dataset(folder / "source", folder / "data", 16, labels="folders", held_out=0.3)


def test_each_image_of_a_dataset_has_its_own_class(conditional: Glow, model: HFlow, images: Tensor, tmp_path: Path) -> None:
    data, out = dataset_of(images, tmp_path), tmp_path / "latents.safetensors"
    names, labels = data.train.names + data.held_out.names, torch.cat([data.train.labels, data.held_out.labels])
    assert labels.unique().tolist() == [0, 1]
    done = encode_to_file(conditional, [data.path], out, batch_size=3)
    assert [image.name for image in done.images] == names and all(image.exact for image in done.images)
    assert LatentFiles(out).labels().tolist() == labels.tolist()
    own = latents_of(conditional, torch.cat([data.train[:], data.held_out[:]]), labels)
    torch.testing.assert_close(load_file(out)["latent.2"], own[-1], rtol=1e-4, atol=1e-4)
    decode_to_folder(conditional, out, tmp_path / "back", batch_size=2)
    back = torch.stack([read_png(path) for path in sorted((tmp_path / "back").iterdir())])
    assert torch.equal(back, torch.cat([data.train[:], data.held_out[:]]))
    encode_to_file(model, [data.path], tmp_path / "of_hflow.safetensors")
    assert LatentFiles(tmp_path / "of_hflow.safetensors").labels() is None


class Recorder(nn.Module):
    """Keeps the labels that it is given."""

    num_classes, resolution, latent_shapes = 2, 16, [(3, 16, 16)]

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.labels: list[int] = []

    def latent_stds(self, std: float) -> list[float]:
        return [std]

    def decode(self, latents: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        self.labels += labels.tolist()
        return latents[0], torch.zeros(len(labels))


class Means(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.float().mean(dim=(2, 3))


def test_samples_for_the_fid_have_the_classes_of_the_data(images: Tensor, tmp_path: Path) -> None:
    data, recorder = dataset_of(images.repeat(2, 1, 1, 1)[:9], tmp_path), Recorder()
    fid_of_model(recorder, data, FeatureExtractor(Means()), n=2 * len(data.train) + 1, std=0.1, batch_size=3)
    own = data.train.labels.tolist()
    assert recorder.labels == [*own, *own, own[0]] and len(set(own)) == 2


def test_classes_by_name_or_number() -> None:
    names = ["cat", "dog", "1"]
    assert [class_number(word, 3, names) for word in ("cat", "dog", "1", "0")] == [0, 1, 2, 0]
    assert class_number("2", 3) == 2
    for word in ("cow", "3", "-1"):
        with pytest.raises(ConfigError, match="cat, dog, 1"):
            class_number(word, 3, names)
    with pytest.raises(ConfigError, match="0 to 2"):
        class_number("cat", 3)
    with pytest.raises(ConfigError, match="and 5 more"):
        class_number("x", 25, [f"class {number}" for number in range(25)])
