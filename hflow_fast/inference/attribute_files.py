"""The files that attributes are kept in: ``<number>.latent.<level>`` for each, and in the metadata what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Sequence

from torch import nn

from ..errors import ConfigError, DatasetError
from .identity import model_fingerprint
from .manipulation import Attribute
from .tensor_files import opened_tensors, save_tensors

__all__ = ["load_attributes", "save_attributes"]

_FORMAT = {"format": "hflow_fast attributes", "version": "1"}


def save_attributes(attributes: Sequence[Attribute], path: str | os.PathLike[str], model: nn.Module) -> None:
    """Writes attributes to a new safetensors file.

    Args:
        attributes: at least one.
        path: the file to make, ending in .safetensors.
        model: whose latents they were found in.

    Raises:
        ConfigError: the name ends otherwise, or there is such a file.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: the name has to end in .safetensors.")
    if os.path.lexists(path):
        raise ConfigError(f"{path}: already exists; give the attributes another name.")
    about = [{"name": each.name, "positives": each.positives, "negatives": each.negatives} for each in attributes]
    tensors = {f"{number}.latent.{level}": part.contiguous() for number, each in enumerate(attributes)
               for level, part in enumerate(each.direction)}
    save_tensors(tensors, path, _FORMAT | {"model": model_fingerprint(model), "attributes": json.dumps(about)})


def load_attributes(path: str | os.PathLike[str], model: nn.Module) -> list[Attribute]:
    """The attributes of a file that :func:`save_attributes` wrote.

    Args:
        path: the file.
        model: the one that they were found with.

    Raises:
        DatasetError: the file is missing, damaged, or of another kind or model.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; give the vectors that hflow-fast manipulate wrote.")
    with opened_tensors(path, _damaged) as tensors:
        metadata = tensors.metadata() or {}
        if {key: metadata.get(key) for key in _FORMAT} != _FORMAT:
            raise DatasetError(f"{path}: not attributes of this version of hflow_fast; give the vectors that "
                               "hflow-fast manipulate wrote.")
        if metadata.get("model") != model_fingerprint(model):
            raise DatasetError(f"{path}: found with another model, or with it before further training; find the "
                               "attributes again.")
        levels = range(len(model.latent_shapes))
        try:
            return [Attribute(str(each["name"]), [tensors.get_tensor(f"{number}.latent.{level}") for level in levels],
                              int(each["positives"]), int(each["negatives"]))
                    for number, each in enumerate(json.loads(metadata["attributes"]))]
        except (ValueError, LookupError, TypeError) as error:
            raise _damaged(path, f"its metadata: {error}") from error


def _damaged(file: Path, reason: str) -> DatasetError:
    return DatasetError(f"{file}: damaged or not a file of attributes ({reason}); find the attributes again.")
