from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch

from hflow_fast.data import ImageDataset
from hflow_fast.training import RunDirectory, Trainer

from .tiny import SIZE, TinyFlow, tiny_config


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """12 training and 4 held-out images of smooth colour."""
    return ImageDataset.open(_write_dataset(tmp_path_factory.mktemp("data"), SIZE))


@pytest.fixture(scope="session")
def dataset_16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 16 × 16 pixels, for the preset tiny-16."""
    return _write_dataset(tmp_path_factory.mktemp("data"), 16)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """The same of 8 × 8 pixels, in the classes bright (of the brighter half of the images) and dark."""
    path = _write_dataset(tmp_path_factory.mktemp("data"), SIZE)
    brightness = np.load(path / "images.npy").mean(axis=(1, 2, 3))
    labels = (brightness < np.median(brightness)).astype(np.int64)
    np.save(path / "labels.npy", labels)
    manifest = json.loads((path / "dataset.json").read_text())
    manifest["recipe"]["labels"] = "folders"
    manifest["labels"] = {"kind": "classes", "names": ["bright", "dark"],
                          "sha256": hashlib.sha256(labels.tobytes()).hexdigest()}
    (path / "dataset.json").write_text(json.dumps(manifest))
    return ImageDataset.open(path)


def _write_dataset(path: Path, size: int) -> Path:
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 100, size)[:, None, None] * np.ones((1, size, 1))
    images = np.stack([ramp + random.uniform(0, 150, 3) for _ in range(16)]).astype(np.uint8)
    np.save(path / "images.npy", images)
    recipe = {"source_fingerprint": "", "resolution": size, "split": "content", "held_out_fraction": 0.25, "seed": 0}
    (path / "dataset.json").write_text(json.dumps({
        "recipe": recipe, "source": "made up", "sha256": hashlib.sha256(images.tobytes()).hexdigest(),
        "names": list(map(str, range(16))), "held_out": [0, 5, 10, 15], "skipped": []}))
    return path


@pytest.fixture
def make_trainer(dataset: ImageDataset) -> Callable[..., Trainer]:
    """``make_trainer(directory, noise=0.0, **general)``: a trainer of a fresh TinyFlow, in a new or existing run."""

    def make(directory: Path, noise: float = 0.0, **general: Any) -> Trainer:
        config = tiny_config(**general)
        torch.manual_seed(0)
        model = TinyFlow(noise)
        run = RunDirectory.open(directory) if directory.exists() else RunDirectory.create(directory, config)
        run.make_folders()
        return Trainer(model, dataset, run, config)

    return make


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
