"""Presets, and the one door through which configuration files enter.

A configuration has the original's JSON layout: ``GENERAL`` (training), ``MODEL_PARAMETERS`` and ``OUTPUT``.
:func:`load_config` finds and reads it; the sections are validated by the code that uses them
(``hflow_fast.models.hflow.config`` and ``hflow_fast.training.config``).
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, Mapping

from ..errors import ConfigError

__all__ = ["load_config", "preset_names"]

_SUFFIX = ".json"


def preset_names() -> list[str]:
    """Names of the configurations that ship with the package."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


def load_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as a fresh dictionary.

    Args:
        source: the name of a preset (see :func:`preset_names`), the path of a JSON file, or a mapping.

    Raises:
        ConfigError: there is no such preset or file, it is not JSON, or it has no ``MODEL_PARAMETERS``.
    """
    if isinstance(source, Mapping):
        config, name = json.loads(json.dumps(source)), "the given mapping"
    else:
        name = os.fspath(source)
        config = _parse(_read(name), name)
    if not isinstance(config, dict) or not isinstance(config.get("MODEL_PARAMETERS"), dict):
        raise ConfigError(f"{name}: no section MODEL_PARAMETERS; a configuration is a JSON object "
                          "with the sections GENERAL, MODEL_PARAMETERS and OUTPUT.")
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
