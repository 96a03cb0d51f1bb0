"""Labelled grids and heat maps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hflow_fast.errors import ConfigError
from hflow_fast.inference import image_grid, studies


def test_labels_stand_beside_an_unchanged_grid() -> None:
    images = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    grid = image_grid(images.flatten(0, 1), 3)
    assert torch.equal(studies.labelled_grid(images), grid)
    page = studies.labelled_grid(images, rows=["first", "the\nsecond"], columns=["a", "b", "c"])
    _, height, width = grid.shape
    assert torch.equal(page[:, -height:, -width:], grid)
    top, left = page[:, :-height, -width:], page[:, -height:, :-width]
    for column in range(3):  # something is written above each column and beside each row, and does not touch the edge
        assert top[:, :, 2 + column * 98:98 + column * 98].min() < 100
    for row in range(2):
        assert left[:, 2 + row * 98:98 + row * 98].min() < 100
    assert page[:, 0].min() == page[:, :, 0].min() == 255


def test_heat_maps_have_one_scale(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    maps = torch.zeros(2, 2, 8, 8)
    maps[1] = 0.5
    file = tmp_path / "maps.png"
    studies.save_heat_maps(images, maps, ["low", "high"], file, label="spread")
    colours = {tuple(colour) for colour in np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)}
    assert {(68, 1, 84), (253, 231, 36)} <= colours  # both ends of viridis: zero, and the largest of all maps


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'hflow_fast\[train\]'"):
        studies.save_heat_maps(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8), ["a"],
                               tmp_path / "maps.png", label="")
