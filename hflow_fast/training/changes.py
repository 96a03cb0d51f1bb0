"""What may change in the configuration of a run between two of its sessions."""

from __future__ import annotations

from typing import Any, Mapping

from ..configs import MODEL_KEYS, model_name
from ..errors import ConfigError
from .config import TrainConfig

__all__ = ["check_changes"]

_FIXED = {
    "GENERAL.SEED": "it has decided the weights and the order of the data",
    "GENERAL.SAMPLES_PER_GRAD_EVAL": "it decides which step is in which epoch",
    "GENERAL.DISCRETIZATION_BITS": "it decides what is modelled",
    "GENERAL.RESIZE_DATA_TO": "it decides what is modelled",
    "GENERAL.LOAD_CHECKPOINT": "training has begun from it",
    "GENERAL.OPTIMIZER": "its moments are those of the optimizer that took them",
}


def check_changes(old: Mapping[str, Any], new: Mapping[str, Any], run: str) -> list[str]:
    """Compares two configurations of a run, defaults filled in.

    Args:
        old: of the run's checkpoint.
        new: to go on with.
        run: for the error.

    Returns:
        A line "KEY: old → new" for each change.

    Raises:
        ConfigError: something changed that cannot change during a run; the text names every such key.
    """
    before, after = _flat(old), _flat(new)
    changes = {key: f"{key}: {before.get(key)} → {after.get(key)}"
               for key in [*before, *(key for key in after if key not in before)] if before.get(key) != after.get(key)}
    refused = [f"{run}: {line}: cannot change during a run, as {reason}; start a new run for it."
               for key, line in changes.items() if (reason := _reason(key))]
    if refused:
        raise ConfigError("\n".join(refused))
    return list(changes.values())


def _reason(key: str) -> str | None:
    return "it describes the model" if key.startswith(MODEL_KEYS) else _FIXED.get(key)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    training = TrainConfig.from_config(config).model_dump(by_alias=True)
    model = {"MODEL": model_name(config), "MODEL_PARAMETERS": config.get("MODEL_PARAMETERS", {})}
    return _leaves(training) | _leaves(model)


def _leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in section.items():
        if not key.strip("-"):
            continue  # the original's visual separators
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves
