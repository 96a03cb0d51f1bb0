"""Presets, and the one door through which configuration files enter.

A configuration has the original's JSON layout: ``GENERAL`` (training), ``MODEL_PARAMETERS`` and ``OUTPUT``, and beside
them ``MODEL``, the name of the model that the parameters are of. :func:`load_config` finds and reads it; the sections
are validated by the code that uses them (``hflow_fast.models`` and ``hflow_fast.training.config``).
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, Mapping

from ..errors import ConfigError

__all__ = ["MODELS", "MODEL_KEYS", "load_config", "model_name", "preset_names"]

MODELS = "hflow", "glow"
"""Values of ``MODEL``; the first one is meant where it is absent, as in the original's files."""
MODEL_KEYS = "MODEL", "MODEL_PARAMETERS"
"""The keys that say which model it is, and nothing of its training."""
_SUFFIX = ".json"


def preset_names(model: str | None = None) -> list[str]:
    """Names of the configurations that ship with the package: all of them, or those of one of :data:`MODELS`."""
    files = resources.files(__package__).iterdir()
    names = sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))
    return names if model is None else [name for name in names if model_name(load_config(name)) == model]


def model_name(config: Mapping[str, Any]) -> str:
    """Which of :data:`MODELS` a configuration is of.

    Raises:
        ConfigError: none of them.
    """
    name = config.get("MODEL", MODELS[0])
    if name not in MODELS:
        raise ConfigError(f"MODEL: {name!r} is none of the models, which are {', '.join(MODELS)}.")
    return name


def load_config(source: str | os.PathLike[str] | Mapping[str, Any], *, model: str | None = None) -> dict[str, Any]:
    """The configuration as a fresh dictionary.

    Args:
        source: the name of a preset (see :func:`preset_names`), the path of a JSON file, or a mapping.
        model: which of :data:`MODELS` it has to be of; None: any.

    Raises:
        ConfigError: there is no such preset or file, it is not JSON, it has no ``MODEL_PARAMETERS``, or it is of
            another model.
    """
    if isinstance(source, Mapping):
        config, name = json.loads(json.dumps(source)), "the given mapping"
    else:
        name = os.fspath(source)
        config = _parse(_read(name), name)
    if not isinstance(config, dict) or not isinstance(config.get("MODEL_PARAMETERS"), dict):
        raise ConfigError(f"{name}: no section MODEL_PARAMETERS; a configuration is a JSON object "
                          "with the sections GENERAL, MODEL_PARAMETERS and OUTPUT.")
    found = model_name(config)
    if model not in (None, found):
        presets = ", ".join(preset_names(model))
        raise ConfigError(f"{name}: its MODEL is {found}, but {model} was asked for; presets of that: {presets}.")
    return config


def _read(name: str) -> str:
    if name in preset_names():
        return (resources.files(__package__) / f"{name}{_SUFFIX}").read_text()
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"{name}: neither a file nor a preset; the presets are {', '.join(preset_names())}.")
    return path.read_text()


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}).") from None
