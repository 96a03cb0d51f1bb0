"""Glow's configurations: the paper's sizes, and mistakes named by key."""

from __future__ import annotations

import json

import pytest
import torch

from hflow_fast import ConfigError
from hflow_fast.configs import load_config, preset_names
from hflow_fast.models import Glow, GlowConfig

from .glow_oracle import SMALL

PRESETS = preset_names("glow")


def built(source) -> Glow:
    with torch.device("meta"):
        return Glow.from_config(source)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def expected_count(resolution: int, levels: int, steps: int, width: int, affine: bool, classes: int = 0) -> int:
    """Written out for the 1 × 1 permutation, edge biases and a learned top."""
    total = 0
    for level in range(levels):
        channels = 12 * 2**level
        half, out = channels // 2, channels if affine else channels // 2
        first = 9 * (half + 1) * width + 2 * width
        second = width * width + 2 * width
        last = 9 * (width + 1) * out + 2 * out
        total += steps * (2 * channels + channels**2 + first + second + last)
        if level < levels - 1:
            total += 9 * (half + 1) * channels + 2 * channels
    top = 2 * channels
    total += 9 * top + 2 * top
    if classes:
        total += (classes + 2) * top + (channels + 2) * classes
    return total


@pytest.mark.parametrize(("name", "millions", "sizes"), [
    ("glow-cifar10", 44.5, (32, 3, 32, 512, True)),
    ("glow-cifar10-conditional", 38.3, (32, 3, 32, 512, False, 10)),
    ("glow-imagenet32", 66.8, (32, 3, 48, 512, True)),
    ("glow-imagenet64", 112.0, (64, 4, 48, 512, True)),
    ("glow-lsun64", 66.8, (64, 3, 48, 512, True)),
    ("glow-celebahq256", 169.8, (256, 6, 32, 512, False)),
    ("glow-demo", 0.4, (32, 3, 6, 48, True)),
    ("glow-tiny-16", 0.0, (16, 2, 2, 8, True)),
])
def test_presets(name, millions, sizes):
    model = built(name)
    assert count(model) == expected_count(*sizes)
    assert round(count(model) / 1e6, 1) == millions
    assert load_config(name)["GENERAL"]["RESIZE_DATA_TO"] == model.resolution
    assert GlowConfig.load(model.config.to_dict()) == model.config


def test_what_cifar10_counts_beyond_the_original():
    """The original also counts the weights that its top prior applies to zeros: 9 · 96 · 96, never trained."""
    assert count(built("glow-cifar10")) + 9 * 96 * 96 == 44_603_604
    assert PRESETS == sorted(["glow-celebahq256", "glow-cifar10", "glow-cifar10-conditional", "glow-demo",
                              "glow-imagenet32", "glow-imagenet64", "glow-lsun64", "glow-tiny-16"])


def test_latent_shapes_of_the_largest():
    assert built("glow-celebahq256").latent_shapes == [
        (6, 128, 128), (12, 64, 64), (24, 32, 32), (48, 16, 16), (96, 8, 8), (384, 4, 4)]


def test_sources_are_equivalent(tmp_path):
    path = tmp_path / "config.json"
    whole = {"MODEL": "glow", "GENERAL": {}, "MODEL_PARAMETERS": SMALL}
    path.write_text(json.dumps(whole))
    config = GlowConfig.load(SMALL)
    assert GlowConfig.load(path) == GlowConfig.load(whole) == GlowConfig.load(config) == config


@pytest.mark.parametrize(("keys", "message"), [
    ({"STEP": 3}, "MODEL_PARAMETERS.STEP: unknown key"),
    ({"STEPS": None}, "MODEL_PARAMETERS.STEPS: missing key"),
    ({"STEPS": 0}, r"MODEL_PARAMETERS.STEPS: .*\(got 0\)"),
    ({"COUPLING": "spline"}, r"MODEL_PARAMETERS.COUPLING: .*'additive' or 'affine' \(got 'spline'\)"),
    ({"PERMUTATION": "3x3"}, r"MODEL_PARAMETERS.PERMUTATION: .*'1x1_lu' \(got '3x3'\)"),
    ({"RESOLUTION": 10}, "RESOLUTION = 10 cannot be halved LEVELS = 2 times; it has to be a multiple of 4"),
    ({"CONDITIONAL": True}, "NUM_CLASSES is missing"),
    ({"CONDITIONAL": True, "NUM_CLASSES": 0}, r"NUM_CLASSES: .*\(got 0\)"),
    ({"CLASSIFIER_WEIGHT": -1}, r"CLASSIFIER_WEIGHT: .*\(got -1\)"),
])
def test_mistakes_are_named(keys, message):
    parameters = {key: value for key, value in (SMALL | keys).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        Glow.from_config(parameters)


def test_all_mistakes_are_listed_together():
    parameters = SMALL | {"EXTRA": 1, "WIDTH": "wide"}
    del parameters["LEVELS"]
    with pytest.raises(ConfigError, match="(?s)LEVELS: missing.*WIDTH: .*EXTRA: unknown"):
        Glow.from_config(parameters)
