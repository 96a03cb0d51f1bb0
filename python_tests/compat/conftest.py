from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import pytest
import torch
from safetensors.torch import load_file

MODELS = Path(__file__).parents[1] / "models" / "golden"


@pytest.fixture(scope="session")
def golden_file() -> Path:
    return Path(__file__).parent / "golden" / "hflow_tiny_original_format.bin"


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return load_file(MODELS / "hflow_tiny_expected.safetensors")


@pytest.fixture(scope="session")
def weights_file() -> Path:
    return MODELS / "hflow_tiny_weights.safetensors"


@pytest.fixture(scope="session")
def weights(weights_file: Path) -> dict[str, torch.Tensor]:
    return load_file(weights_file)


@pytest.fixture(scope="session")
def config_file() -> Path:
    return MODELS / "hflow_tiny_config.json"


@pytest.fixture(scope="session")
def config(config_file: Path) -> dict:
    return json.loads(config_file.read_text())


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that a hostile checkpoint would make."""
    return tmp_path / "canary"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes model.bin."""
    path = tmp_path / "model.bin"

    def write(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    return write
