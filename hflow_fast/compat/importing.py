"""Models of the original implementation as models of this package."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..configs import load_config
from ..errors import CheckpointError, ConfigError
from ..models import HFlow, HFlowConfig
from ..models.hflow.original import check_original
from ..training.config import GeneralConfig, OutputConfig, TrainConfig
from .original_file import OriginalFile, read_original

__all__ = ["Imported", "import_file", "import_original"]

_PATHS = {"DATASET_PATH", "INCEPTION_NET_PATH", "LOAD_CHECKPOINT"}
"""Settings that name files of the machine where the model was trained."""


@dataclass(frozen=True)
class Imported:
    """An imported model and what was found beside it."""

    model: HFlow
    config: dict[str, Any]
    """Accepted by ``HFlow.from_config`` and ``TrainConfig.from_config``."""
    left_out: list[str]
    """Settings that mean nothing here, as SECTION.KEY."""
    tensors: int
    """Tensors found, with those that are derived from the configuration."""
    original: OriginalFile | None
    """The original's checkpoint file, if it was one."""


def import_original(
    path: str | os.PathLike[str], config: str | os.PathLike[str] | Mapping[str, Any] | None = None
) -> tuple[HFlow, dict[str, Any]]:
    """The model in a checkpoint file of the original, ready for evaluation, and its configuration.

    Nothing in the file is run or imported: see :mod:`.pickles`. The weights are the moving average, which is what
    such a file holds. Paths of the machine where it was trained and keys unknown here are left out of the
    configuration.

    Args:
        path: a file that the original's ``Network.save`` wrote, such as its released models.
        config: used instead of the settings in the file: a preset's name, a JSON file or a mapping.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or its weights do not fit the configuration.
        ConfigError: the configuration has a key that is missing or inconsistent.

    Example:
        >>> model, config = import_original("model.bin")  # doctest: +SKIP
    """
    imported = _from_original(Path(path), config)
    return imported.model, imported.config


def import_file(
    path: str | os.PathLike[str], config: str | os.PathLike[str] | Mapping[str, Any] | None = None
) -> Imported:
    """As :func:`import_original`, with what else there is to say about the file.

    Besides checkpoint files, ``path`` may be a safetensors file with the original's state dict; that needs ``config``.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _from_state_dict(path, config)
    return _from_original(path, config)


def _from_original(path: Path, config: Any) -> Imported:
    found = read_original(path)
    settings = load_config(config, model="hflow") if config is not None else found.settings
    if settings is None:
        raise CheckpointError(f"{path}: holds no settings, as files of early versions; give them with --config.")
    return _build(path, settings, found.weights, found)


def _from_state_dict(path: Path, config: Any) -> Imported:
    try:
        with safe_open(path, framework="pt") as file:
            is_ours = (file.metadata() or {}).get("format", "").startswith("hflow_fast")
        if is_ours:
            raise CheckpointError(f"{path}: a file of hflow_fast already, which every command takes as it is.")
        if config is None:
            raise CheckpointError(f"{path}: a state dict alone; give the configuration that belongs to it with "
                                  "--config.")
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}).") from error
    return _build(path, load_config(config, model="hflow"), weights, None)


def _build(path: Path, settings: dict[str, Any], weights: dict[str, Tensor], found: OriginalFile | None) -> Imported:
    try:
        config, left_out = _known_settings(settings)
        TrainConfig.from_config(config)
        _check_size(config, weights)
        model = HFlow.from_original(config, weights).eval()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {_printable(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: its settings cannot be used; correct a copy and give it with --config. "
                          f"{_printable(error)}") from None
    return Imported(model, config, left_out, len(weights), found)


def _known_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that mean something here, and the names of the others."""
    fields = {"GENERAL": GeneralConfig.model_fields, "OUTPUT": OutputConfig.model_fields}
    config, left_out = {}, []
    for section, values in settings.items():
        if section == "MODEL_PARAMETERS" or section in fields and type(values) is not dict:
            config[section] = values  # checked as a whole, where it is used
        elif section in fields:
            known = {name.upper() for name in fields[section]} - _PATHS
            config[section] = {key: value for key, value in values.items() if key in known}
            left_out += [f"{section}.{key}" for key, value in values.items() if key not in known and value]
        else:
            left_out.append(section)
    return config, [_printable(name) for name in left_out]


def _check_size(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Checks that the weights are those of the configuration without allocating what it asks for.

    The settings come from the file as well, and may ask for any number of layers or channels.
    """
    parsed = HFlowConfig.parse(config.get("MODEL_PARAMETERS"), "MODEL_PARAMETERS")
    layers = zip(parsed.num_layers, parsed.unet_n_downscales)
    parts = len(parsed.resolutions) + sum(parsed.endblock_settings.layers) + sum(n * (1 + m) for n, m in layers)
    if parts > len(weights):  # each has several tensors
        raise CheckpointError(f"its settings describe a network of {parts:,} parts, but it has only "
                              f"{len(weights):,} tensors.")
    try:
        with torch.device("meta"):
            model = HFlow.from_config(config)
    except ConfigError:
        raise
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError("its settings describe a network too large for any computer "
                              f"({str(error).splitlines()[0][:100]}).") from None
    check_original(model, weights)


def _printable(text: object) -> str:
    """Text that may quote the file, without what a terminal could take for more than text."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))
