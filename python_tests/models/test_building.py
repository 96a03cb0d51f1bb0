"""Models by the name that their configurations give."""

from __future__ import annotations

import re

import pytest
import torch

from hflow_fast.configs import MODELS, load_config, model_name, preset_names
from hflow_fast.errors import ConfigError
from hflow_fast.models import Glow, HFlow
from hflow_fast.models.building import build_model

CLASSES = {"hflow": HFlow, "glow": Glow}


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_of_the_model_that_it_names(preset: str) -> None:
    with torch.device("meta"):
        model = build_model(preset)
    config = load_config(preset)
    assert type(model) is CLASSES[model_name(config)]
    assert preset in preset_names(model_name(config)) and model.resolution == config["GENERAL"]["RESIZE_DATA_TO"]


def test_presets_belong_to_one_model_each() -> None:
    assert sorted(name for model in MODELS for name in preset_names(model)) == preset_names()
    assert "tiny-16" in preset_names("hflow") and all(name.startswith("glow-") for name in preset_names("glow"))


def test_without_a_name_it_is_an_hflow() -> None:
    config = load_config("tiny-16")
    assert "MODEL" not in config
    for named in (config, config | {"MODEL": "hflow"}):
        assert type(build_model(named)) is HFlow


@pytest.mark.parametrize("name", ["Glow", "realnvp", None, ["glow"], 3])
def test_an_unknown_name_lists_the_models(name: object) -> None:
    message = f"MODEL: {re.escape(repr(name))} is none of the models, which are hflow, glow"
    with pytest.raises(ConfigError, match=message):
        build_model(load_config("tiny-16") | {"MODEL": name})


def test_a_configuration_of_another_model_is_refused() -> None:
    glow = preset_names("glow")[0]
    with pytest.raises(ConfigError, match=f"{glow}: its MODEL is glow, but hflow was asked for; presets .*: A-128"):
        HFlow.from_config(glow)
    assert load_config(glow, model="glow")["MODEL"] == "glow"
    with pytest.raises(ConfigError, match=f"the given mapping: its MODEL is hflow, but glow .*{glow}"):
        load_config(load_config("tiny-16"), model="glow")
