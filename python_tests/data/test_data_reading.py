"""Opening and indexing a dataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hflow_fast.data import ImageDataset, create_dataset
from hflow_fast.errors import DatasetError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    create_dataset(tmp_path / "images", tmp_path / "dataset", 4, held_out=0.3)
    return tmp_path / "dataset"


def test_every_way_of_indexing(path: Path):
    train = ImageDataset.open(path).train
    everything = torch.stack([train[i] for i in range(len(train))])
    assert everything.shape == (7, 3, 4, 4) and everything.dtype == torch.uint8
    assert torch.equal(torch.stack(list(train)), everything)
    index = torch.tensor([5, 0, 5])
    for chosen in (index, index.tolist(), index.numpy()):
        assert torch.equal(train[chosen], everything[index])
    assert torch.equal(train[1:3], everything[1:3]) and torch.equal(train[-1], everything[6])
    assert train[index].is_contiguous() and train[index[:0]].shape == (0, 3, 4, 4)
    with pytest.raises(IndexError):
        train[7]


def test_what_is_read_does_not_change_the_file(path: Path):
    dataset = ImageDataset.open(path)
    dataset.train[0].fill_(0)
    dataset.train[:].fill_(0)
    ImageDataset.open(path).verify()


def damage(path: Path, case: str) -> None:
    array, manifest = path / "images.npy", path / "dataset.json"
    content = json.loads(manifest.read_text())
    if case == "missing array":
        array.unlink()
    elif case == "short array":
        array.write_bytes(array.read_bytes()[:-1])
    elif case == "empty array":
        array.write_bytes(b"")
    elif case == "other array":
        np.save(array, np.zeros((10, 8, 8, 3), np.uint8))
    elif case == "missing manifest":
        manifest.unlink()
    elif case == "cut manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif case == "other version":
        manifest.write_text(json.dumps(content | {"version": 2}))
    elif case == "wild positions":
        manifest.write_text(json.dumps(content | {"held_out": [10]}))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing array", "images.npy: damaged"),
        ("short array", "images.npy: damaged"),
        ("empty array", "images.npy: damaged"),
        ("other array", r"images.npy: damaged.*\(10, 8, 8, 3\)"),
        ("missing manifest", "dataset: not a dataset, dataset.json is missing; make one with"),
        ("cut manifest", "dataset.json: damaged"),
        ("other version", "dataset.json: damaged .version"),
        ("wild positions", "dataset.json: damaged .held_out"),
    ],
)
def test_a_damaged_dataset_says_which_file(path: Path, case: str, message: str):
    damage(path, case)
    with pytest.raises(DatasetError, match=message):
        ImageDataset.open(path)


def test_a_missing_dataset(tmp_path: Path):
    with pytest.raises(DatasetError, match="no such dataset; make one with hflow-fast dataset"):
        ImageDataset.open(tmp_path / "nothing")


def test_verify_finds_a_changed_pixel(path: Path):
    pixels = np.load(path / "images.npy")
    pixels[3, 1, 2, 0] ^= 1
    np.save(path / "images.npy", pixels)
    with pytest.raises(DatasetError, match="not those that were written"):
        ImageDataset.open(path).verify()


def test_the_fingerprint_tells_splits_apart(path: Path, tmp_path: Path):
    one = ImageDataset.open(path)
    same = create_dataset(tmp_path / "images", tmp_path / "same", 4, held_out=0.3)
    other = create_dataset(tmp_path / "images", tmp_path / "other", 4, held_out=0.3, seed=1)
    assert one.manifest.sha256 == other.manifest.sha256
    assert one.fingerprint == same.fingerprint != other.fingerprint
