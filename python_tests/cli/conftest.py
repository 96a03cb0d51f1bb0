from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hflow_fast.cli import main


def hflow_fast(*arguments: object) -> Result:
    """Runs the command line in this process."""
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 40 images, 16 × 16."""
    source = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(source / f"{index}.png")
    out = tmp_path_factory.mktemp("data") / "set"
    result = hflow_fast("dataset", source, out, "--resolution", 16, "--held-out", 0.2)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps."""
    path = tmp_path_factory.mktemp("runs") / "first"
    result = hflow_fast("train", "--config", "tiny-16", "--data", data, "--run", path, "--steps", 2,
                        "--batch-size", 4, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return path
