"""The image set in the repository is what its README says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from hflow_fast.data import create_dataset

FOLDER = Path(__file__).parents[2] / "datasets"


def test_the_zip_is_the_documented_one_and_its_split_does_not_leak(tmp_path: Path):
    archive, readme = FOLDER / "noto_emoji_64.zip", (FOLDER / "README.md").read_text()
    content = archive.read_bytes()
    assert len(content) <= 10_000_000 and f"{len(content):,} bytes" in readme
    assert hashlib.sha256(content).hexdigest() in readme

    dataset = create_dataset(archive, tmp_path / "emoji", 32)
    assert not dataset.manifest.skipped
    assert f"{len(dataset.names):,} colour pictures" in readme
    assert f"{len(dataset.train):,} in `train/` and {len(dataset.held_out)} in\n`held_out/`" in readme
    # Not even nearly equal: 20 of 255 is what the faces of two clocks differ by.
    train, held_out = (part[:].flatten(1).double() for part in (dataset.train, dataset.held_out))
    assert (torch.cdist(held_out, train) / train.shape[1] ** 0.5).min() > 20
