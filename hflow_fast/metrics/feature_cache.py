"""Sums over the features of a dataset, kept on disk between evaluations."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import replacing

__all__ = ["FeatureCache", "default_cache"]

_FORMAT = {"format": "hflow_fast features", "version": "1"}


def default_cache() -> Path:
    """The user's cache folder for features: ``$XDG_CACHE_HOME/hflow_fast/features``, or below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hflow_fast" / "features"


class FeatureCache:
    """Files of tensors named by what they were computed from.

    A file that is damaged, or that belongs to something else, counts as absent; one that cannot be written is
    warned about. So the worst that a cache can do is not to help.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)

    def path(self, origin: Mapping[str, str]) -> Path:
        """The file of what was computed from ``origin``."""
        return self._directory / f"{hashlib.sha256(_text(origin).encode()).hexdigest()}.safetensors"

    def read(self, origin: Mapping[str, str]) -> dict[str, Tensor] | None:
        """The tensors computed from ``origin``; None if there are none that are whole."""
        path = self.path(origin)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{path}: damaged ({error}); computed again.", stacklevel=2)
            return None
        if metadata != _FORMAT | {"origin": _text(origin), "sha256": _digest(tensors)}:
            warnings.warn(f"{path}: damaged (its content is not what was written); computed again.", stacklevel=2)
            return None
        return tensors

    def write(self, origin: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        """Keeps the tensors computed from ``origin``."""
        path = self.path(origin)
        metadata = _FORMAT | {"origin": _text(origin), "sha256": _digest(tensors)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(dict(tensors), temporary, metadata=metadata)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{path}: not written ({error}); the features will be computed again next time.", stacklevel=2)


def _text(origin: Mapping[str, str]) -> str:
    return json.dumps(dict(origin), sort_keys=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().numpy())
    return digest.hexdigest()
