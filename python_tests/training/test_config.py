from __future__ import annotations

from typing import Any

import pytest

from hflow_fast.errors import ConfigError
from hflow_fast.training import TrainConfig

from .tiny import tiny_config


def test_reads_the_keys_of_the_original() -> None:
    config = TrainConfig.from_config(tiny_config(NUM_GPUS=1, DATASET_PATH=None, RESIZE_DATA_TO=128, EPOCHS=2000))
    assert config.general.learning_rate_encoders == 5e-4
    assert config.general.epochs == 2000
    assert config.output.checkpoint_every == 4.0


@pytest.mark.parametrize("changes, words", [
    ({"LERNING_RATE": 1.0}, ["GENERAL.LERNING_RATE", "unknown"]),
    ({"BATCH_SIZE": 0}, ["GENERAL.BATCH_SIZE", "0"]),
    ({"BATCH_SIZE": 3}, ["SAMPLES_PER_GRAD_EVAL (4)", "BATCH_SIZE (3)"]),
    ({"LEARNING_RATE_DECAY": 1.5}, ["GENERAL.LEARNING_RATE_DECAY", "1.5"]),
    ({"GRAD_CLIP": float("nan")}, ["GENERAL.GRAD_CLIP"]),
    ({"DISCRETIZATION_BITS": "eight"}, ["GENERAL.DISCRETIZATION_BITS", "'eight'"]),
    ({"STEPS": None}, ["EPOCHS", "STEPS", "HOURS"]),
    ({"OPTIMIZER": "sgd"}, ["GENERAL.OPTIMIZER", "'adam' or 'adamax'", "'sgd'"]),
    ({"WARMUP_EPOCHS": -1}, ["GENERAL.WARMUP_EPOCHS", "-1"]),
    ({"BETA2": 1.0}, ["GENERAL.BETA2", "1.0"]),
    ({"CLASS_NAMES": "cat"}, ["GENERAL.CLASS_NAMES", "'cat'"]),
])
def test_bad_values_name_their_key(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_config(tiny_config(**changes))
    assert all(word in str(error.value) for word in words)


def test_every_missing_key_is_named() -> None:
    config = tiny_config()
    del config["GENERAL"]["LEARNING_RATE"], config["GENERAL"]["BATCH_SIZE"]
    with pytest.raises(ConfigError, match="GENERAL.LEARNING_RATE: missing key.*\nGENERAL.BATCH_SIZE: missing key"):
        TrainConfig.from_config(config)


def test_what_other_models_leave_out() -> None:
    own = {"LEARNING_RATE": 1e-3, "BATCH_SIZE": 4, "SAMPLES_PER_GRAD_EVAL": 4, "EPOCHS": 1}
    general = TrainConfig.from_config({"MODEL": "glow", "GENERAL": own, "MODEL_PARAMETERS": {}}).general
    assert (general.optimizer, general.warmup_epochs, general.beta2) == ("adam", 0.0, None)
    assert general.learning_rate_encoders is general.learning_rate_decoders is general.class_names is None


def test_unknown_and_missing_sections() -> None:
    with pytest.raises(ConfigError, match="GENERAL: missing key.*\nOUTPTU: unknown key"):
        TrainConfig.from_config({"OUTPTU": {}, "MODEL_PARAMETERS": {}})


def test_what_the_original_writes_for_nothing_is_none() -> None:
    general = TrainConfig.from_config(tiny_config(
        DATASET_NAME="", INCEPTION_NET_PATH="", LOAD_CHECKPOINT="", GRAD_CLIP=-1.0)).general
    assert general.dataset_name is general.inception_net_path is general.load_checkpoint is None
    assert general.grad_clip == -1.0


@pytest.mark.parametrize("value, kept", [(None, None), (0, 0), (5, 5)])
def test_number_of_checkpoints(value: int | None, kept: int | None) -> None:
    assert TrainConfig.from_config(tiny_config()).output.keep_checkpoints == 3
    config = tiny_config() | {"OUTPUT": {"KEEP_CHECKPOINTS": value}}
    assert TrainConfig.from_config(config).output.keep_checkpoints == kept
