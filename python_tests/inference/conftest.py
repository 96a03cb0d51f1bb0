from __future__ import annotations

import pytest
import torch

from hflow_fast.models import Glow, HFlow


@pytest.fixture(scope="session")
def model() -> HFlow:
    """Sixteen pixels, two levels, with weights moved away from their special start. Not to be changed."""
    torch.manual_seed(0)
    model = HFlow.from_config("tiny-16")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.initialize(torch.rand(16, 3, 16, 16) - 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def glow() -> Glow:
    """Sixteen pixels, three levels. Not to be changed."""
    return _trained_like(conditional=False)


@pytest.fixture(scope="session")
def conditional() -> Glow:
    """The same with three classes. Not to be changed."""
    return _trained_like(conditional=True, num_classes=3)


def _trained_like(**parameters: object) -> Glow:
    """With weights moved away from their special start."""
    torch.manual_seed(0)
    model = Glow.from_config({"MODEL": "glow", "MODEL_PARAMETERS": {
        "RESOLUTION": 16, "LEVELS": 3, "STEPS": 2, "WIDTH": 12, "COUPLING": "affine", "PERMUTATION": "1x1",
        **{name.upper(): value for name, value in parameters.items()}}})
    labels = (torch.arange(16) % 3,) if model.num_classes else ()
    model.initialize(torch.rand(16, 3, 16, 16) - 0.5, *labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    """(5, 3, 16, 16), uint8, with black and white among the values."""
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images[0, :, :2, :2] = 0
    images[1, :, :2, :2] = 255
    return images
