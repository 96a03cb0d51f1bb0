"""Safetensors files, written whole or not at all."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import replacing

__all__ = ["opened_tensors", "save_tensors"]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes one file.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error}).") from error
        temporary.chmod(mode)  # safetensors makes files that nobody but their owner can read


@contextmanager
def opened_tensors(file: Path, damaged: Callable[[Path, str], Exception]) -> Iterator[Any]:
    """A file for reading; what is wrong with it, also while it is read, is raised as ``damaged(file, reason)``."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise damaged(file, str(error)) from error
