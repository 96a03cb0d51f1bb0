"""Attributes as directions in latent space."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hflow_fast.data import ImageDataset, create_dataset, to_uint8
from hflow_fast.errors import ConfigError, DatasetError
from hflow_fast.inference import (Attribute, AttributeMeans, attribute_of_images, attributes_of_dataset, latents_of,
                                  load_attributes, manipulate, open_images, save_attributes, save_png)
from hflow_fast.models import Glow, HFlow


def tinted(count: int, red: int, seed: int) -> Tensor:
    """Images of dim noise, with more or less red."""
    images = torch.randint(0, 100, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    images[:, 0] += red
    return images


@pytest.fixture(params=["glow", "model"])
def flow(request: pytest.FixtureRequest) -> Glow | HFlow:
    """A Glow and an HFlow."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Seven red images and five others."""
    for name, images in (("red", tinted(7, 150, 0)), ("dark", tinted(5, 0, 1))):
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            save_png(image, tmp_path / name / f"{number}.png")
    return tmp_path / "red", tmp_path / "dark"


def means_of(flow: Glow | HFlow, positive: Tensor, negative: Tensor, *labels: int) -> list[Tensor]:
    """The difference of the means, computed with all images at once in float64."""
    sides = (latents_of(flow, images, *labels) for images in (positive, negative))
    return [a.double().mean(dim=0) - b.double().mean(dim=0) for a, b in zip(*sides)]


def assert_direction(attribute: Attribute, expected: list[Tensor]) -> None:
    for part, wanted in zip(attribute.direction, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), wanted, rtol=1e-4, atol=1e-5)


def test_direction_is_the_difference_of_the_means(flow: Glow | HFlow, folders: tuple[Path, Path]) -> None:
    counts: list[int] = []
    with open_images([folders[0]], 16) as red, open_images([folders[1]], 16) as dark:
        attribute = attribute_of_images(flow, red, dark, name="red", batch_size=3, progress=counts.append)
    assert (attribute.name, attribute.positives, attribute.negatives) == ("red", 7, 5) and sum(counts) == 12
    assert_direction(attribute, means_of(flow, tinted(7, 150, 0), tinted(5, 0, 1)))


def test_several_attributes_in_one_pass(glow: Glow) -> None:
    images = torch.cat([tinted(6, 150, 0), tinted(6, 0, 1)])
    has = torch.zeros(12, 2, dtype=torch.bool)
    has[:6, 0] = has[::3, 1] = True
    means = AttributeMeans(glow, ["red", "third"])
    for start in range(0, 12, 5):
        means.update(images[start:start + 5], has[start:start + 5])
    red, third = means.attributes()
    assert (third.positives, third.negatives) == (4, 8)
    assert_direction(red, means_of(glow, images[:6], images[6:]))
    assert_direction(third, means_of(glow, images[has[:, 1]], images[~has[:, 1]]))
    with pytest.raises(ValueError, match=r"\(12, 1\).*\(12, 2\)"):
        means.update(images, has[:, :1])


def test_strength_moves_along_the_direction(flow: Glow | HFlow, images: Tensor, folders: tuple[Path, Path]) -> None:
    with open_images([folders[0]], 16) as red, open_images([folders[1]], 16) as dark:
        attribute = attribute_of_images(flow, red, dark)
    changed = manipulate(flow, images, attribute, [-0.5, 0.0, 1.0], batch_size=2)
    assert changed.shape == (3, *images.shape) and changed.dtype == torch.uint8
    assert torch.equal(changed[1], images)
    for row, strength in ((0, -0.5), (2, 1.0)):
        moved = [z + 1.6 * strength * part for z, part in zip(latents_of(flow, images), attribute.direction)]
        with torch.no_grad():
            expected = to_uint8(flow.decode(moved)[0])
        assert (changed[row].int() - expected.int()).abs().max() <= 1
    plain = manipulate(flow, images, attribute, [1.0], factor=0.0)
    assert torch.equal(plain[0], images)


def test_images_that_are_not_finite_are_counted(
    flow: Glow | HFlow, images: Tensor, folders: tuple[Path, Path]
) -> None:
    with open_images([folders[0]], 16) as red, open_images([folders[1]], 16) as dark:
        attribute = attribute_of_images(flow, red, dark, name="red")
    with pytest.warns(RuntimeWarning, match=f"'red': {len(images)} of {2 * len(images)} images .* nearer to 0"):
        changed = manipulate(flow, images, attribute, [0.0, float("inf")])
    assert torch.equal(changed[0], images)


def test_adding_red_makes_images_redder(glow: Glow) -> None:
    means = AttributeMeans(glow, ["red"])
    for count, red in ((20, 150), (20, 0)):
        means.update(tinted(count, red, red), torch.full((count, 1), red > 0))
    changed = manipulate(glow, tinted(4, 60, 7), means.attributes()[0], [-0.3, 0.0, 0.3])
    reds = changed[:, :, 0].float().mean(dim=(1, 2, 3)) - changed[:, :, 1:].float().mean(dim=(1, 2, 3, 4))
    assert reds[0] < reds[1] - 10 and reds[1] + 10 < reds[2]


def test_classes_of_conditional_models(conditional: Glow, images: Tensor, folders: tuple[Path, Path]) -> None:
    with open_images([folders[0]], 16) as red, open_images([folders[1]], 16) as dark:
        attribute = attribute_of_images(conditional, red, dark, label=2)
        with pytest.raises(ConfigError, match="class-conditional"):
            attribute_of_images(conditional, red, dark)
    assert_direction(attribute, means_of(conditional, tinted(7, 150, 0), tinted(5, 0, 1), 2))
    changed = manipulate(conditional, images, attribute, [0.0, 0.5], label=1)
    assert torch.equal(changed[0], images)
    moved = [z + 0.8 * part for z, part in zip(latents_of(conditional, images, 1), attribute.direction)]
    with torch.no_grad():
        expected = to_uint8(conditional.decode(moved, torch.ones(5, dtype=torch.int64))[0])
    assert (changed[1].int() - expected.int()).abs().max() <= 1


@pytest.fixture
def labelled(folders: tuple[Path, Path], tmp_path: Path) -> tuple[ImageDataset, ImageDataset]:
    """The folders as a dataset with classes, and one with attributes."""
    source = tmp_path / "source"
    source.mkdir()
    for folder in folders:
        folder.rename(source / folder.name)
    with open(tmp_path / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "red", "even"])
        for path in sorted(source.rglob("*.png")):
            table.writerow([path.relative_to(source), int(path.parent.name == "red"), int(int(path.stem) % 2 == 0)])
    return (create_dataset(source, tmp_path / "classes", 16, labels="folders", held_out=0.2),
            create_dataset(source, tmp_path / "attributes", 16, labels=tmp_path / "table.csv", held_out=0.2))


def test_attributes_and_classes_of_datasets(glow: Glow, labelled: tuple[ImageDataset, ImageDataset]) -> None:
    classes, attributes = labelled
    by_class, = attributes_of_dataset(glow, classes, ["red"], batch_size=3)
    even, red = attributes_of_dataset(glow, attributes, ["even", "red"], batch_size=3)
    images, names = classes.train[:], classes.train.names
    is_red = torch.tensor(["red/" in name for name in names])
    assert attributes.train.names == names and by_class.positives == int(is_red.sum())
    assert_direction(by_class, means_of(glow, images[is_red], images[~is_red]))
    assert_direction(red, means_of(glow, images[is_red], images[~is_red]))
    is_even = torch.tensor([int(Path(name).stem) % 2 == 0 for name in names])
    assert_direction(even, means_of(glow, images[is_even], images[~is_even]))
    with pytest.raises(DatasetError, match="'blue'.*dark, red"):
        attributes_of_dataset(glow, classes, ["red", "blue"])


def test_too_few_images(glow: Glow, folders: tuple[Path, Path], tmp_path: Path) -> None:
    for found, count in ((torch.ones(4, 1), "4 images have it and 0"), (torch.zeros(4, 1), "0 images have it and 4"),
                         (torch.tensor([[1.0], [0], [0], [0]]), "1 images have it and 3")):
        means = AttributeMeans(glow, ["red"])
        means.update(tinted(4, 0, 0), found.bool())
        with pytest.raises(DatasetError, match=f"'red': {count} do not; give at least 2 of each"):
            means.attributes()
    for names in ([], ["red", "red"]):
        with pytest.raises(ConfigError, match="attributes"):
            AttributeMeans(glow, names)
    unlabelled = create_dataset(folders[0], tmp_path / "plain", 16, held_out=0.2)
    with pytest.raises(DatasetError, match="no labels"):
        attributes_of_dataset(glow, unlabelled, ["red"])
    other = create_dataset(folders[0], tmp_path / "other", 8, held_out=0.2)
    with pytest.raises(DatasetError, match="8 px"):
        attributes_of_dataset(glow, other, ["red"])


def test_latents_that_are_not_finite_are_an_error(glow: Glow) -> None:
    torch.manual_seed(0)
    broken = Glow.from_config(glow.config.to_dict())
    broken.initialize(torch.rand(8, 3, 16, 16) - 0.5)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    means = AttributeMeans(broken.eval(), ["red"])
    means.update(tinted(4, 0, 0), torch.tensor([[True], [False]] * 2))
    with pytest.raises(ArithmeticError, match="not finite"):
        means.attributes()


def test_attributes_on_disk(glow: Glow, conditional: Glow, model: HFlow, tmp_path: Path) -> None:
    torch.manual_seed(0)
    attributes = [Attribute(name, [torch.randn(shape) for shape in glow.latent_shapes], 3, count)
                  for name, count in (("smiling", 4), ("with, comma", 5))]
    path = tmp_path / "vectors.safetensors"
    save_attributes(attributes, path, glow)
    for found, saved in zip(load_attributes(path, glow), attributes, strict=True):
        assert (found.name, found.positives, found.negatives) == (saved.name, saved.positives, saved.negatives)
        assert all(torch.equal(a, b) for a, b in zip(found.direction, saved.direction, strict=True))
    with pytest.raises(ConfigError, match="already exists"):
        save_attributes(attributes, path, glow)
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        save_attributes(attributes, tmp_path / "vectors.npz", glow)
    for other in (conditional, model):
        with pytest.raises(DatasetError, match="another model"):
            load_attributes(path, other)
    with pytest.raises(DatasetError, match="shapes"):
        manipulate(model, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), attributes[0], [1.0])


def test_damaged_files_of_attributes(glow: Glow, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_attributes([Attribute("a", [torch.zeros(shape) for shape in glow.latent_shapes], 2, 2)], good, glow)
    with safe_open(good, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(good)
    torn, text = tmp_path / "torn", tmp_path / "text"
    torn.write_bytes(good.read_bytes()[:-7])
    text.write_text("text")
    save_file(tensors, tmp_path / "foreign", {"format": "pt"})
    save_file(tensors, tmp_path / "nameless", metadata | {"attributes": "["})
    save_file({name: value for name, value in tensors.items() if name != "0.latent.1"}, tmp_path / "less", metadata)
    for name, words in (("torn", "damaged"), ("text", "damaged"), ("foreign", "not attributes"),
                        ("nameless", "metadata"), ("less", "damaged"), ("none", "no such file")):
        with pytest.raises(DatasetError, match=f"{name}: .*{words}"):
            load_attributes(tmp_path / name, glow)
