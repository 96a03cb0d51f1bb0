"""The original's numbers, and a model with the original's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hflow_fast.models import HFlow

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "hflow_tiny_expected.safetensors")


@pytest.fixture(scope="session")
def original_weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "hflow_tiny_weights.safetensors")


@pytest.fixture(scope="session")
def original_config() -> dict:
    return json.loads((GOLDEN / "hflow_tiny_config.json").read_text())


@pytest.fixture
def original_model(original_config, original_weights) -> HFlow:
    return HFlow.from_original(original_config, original_weights)


@pytest.fixture
def tiny_model() -> HFlow:
    """Sixteen pixels, initialised, with weights moved away from their special start (zeros, identities)."""
    torch.manual_seed(0)
    model = HFlow.from_config("tiny-16")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.initialize(torch.rand(16, 3, 16, 16) - 0.5)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 0.5
