from __future__ import annotations

from typing import Any

import pytest

from hflow_fast.errors import ConfigError
from hflow_fast.training.changes import check_changes

from .tiny import tiny_config


def test_defaults_and_separators_are_no_changes() -> None:
    old, new = tiny_config(), tiny_config(EMA_WEIGHT=0.005, DATASET_NAME="", NUM_GPUS=1)
    new["OUTPUT"] = {"CHECKPOINT_EVERY": 4.0}
    new["MODEL_PARAMETERS"] = {"---": ""}
    assert check_changes(old, new, "run") == []


def test_what_may_change_is_listed() -> None:
    new = tiny_config(LEARNING_RATE=1e-3, BATCH_SIZE=4, STEPS=None, EPOCHS=9)
    new["OUTPUT"] = {"KEEP_CHECKPOINTS": 7}
    assert check_changes(tiny_config(), new, "run") == [
        "GENERAL.LEARNING_RATE: 0.005 → 0.001", "GENERAL.BATCH_SIZE: 2 → 4", "GENERAL.EPOCHS: None → 9",
        "GENERAL.STEPS: 6 → None", "OUTPUT.KEEP_CHECKPOINTS: 3 → 7"]


@pytest.mark.parametrize("general, model, key", [
    ({"SEED": 1}, {}, "GENERAL.SEED: 0 → 1"),
    ({"SAMPLES_PER_GRAD_EVAL": 8}, {}, "GENERAL.SAMPLES_PER_GRAD_EVAL: 4 → 8"),
    ({"DISCRETIZATION_BITS": 5}, {}, "GENERAL.DISCRETIZATION_BITS: 8 → 5"),
    ({"OPTIMIZER": "adamax"}, {}, "GENERAL.OPTIMIZER: adam → adamax"),
    ({}, {"ENDBLOCK_SETTINGS": {"LAYERS": [1]}}, "MODEL_PARAMETERS.ENDBLOCK_SETTINGS.LAYERS: None → "),
])
def test_what_may_not_change_is_refused(general: dict[str, Any], model: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_changes(tiny_config(), tiny_config(**general, LEARNING_RATE=1.0) | {"MODEL_PARAMETERS": model}, "runs/a")
    assert str(error.value).startswith(f"runs/a: {key}") and "start a new run" in str(error.value)
    assert "LEARNING_RATE" not in str(error.value)


def test_the_model_cannot_be_another() -> None:
    assert check_changes(tiny_config(), tiny_config() | {"MODEL": "hflow"}, "runs/a") == []
    with pytest.raises(ConfigError, match="runs/a: MODEL: hflow → glow: cannot change during a run"):
        check_changes(tiny_config(), tiny_config() | {"MODEL": "glow"}, "runs/a")
