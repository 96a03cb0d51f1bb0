"""The files that latents are kept in.

A file holds ``latent.0`` (N, C, H, W), the finest level's, ``latent.1`` … to the coarsest; ``log_det`` (N,) of the
flows; ``max_error`` and ``mean_error`` (N,), by which the images that the latents give differ from the originals, in
steps of 8 bits; and, of a class-conditional model, ``labels`` (N,), under which they were encoded. Its metadata say
which model made it, and the images' names. What is too large for one file becomes several, and an index that lists
them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .._files import replacing
from ..errors import ConfigError, DatasetError
from .tensor_files import opened_tensors, save_tensors

__all__ = ["LatentFiles", "check_free", "numbered", "save_index", "save_latents"]

_FORMAT = {"format": "hflow_fast latents", "version": "1"}
_LABELS = "labels"


class LatentFiles:
    """Latents as :func:`encode_to_file` wrote them. Tensors stay on disk until they are asked for.

    Args:
        path: what was given to :func:`encode_to_file`, one of its files, or the index.

    Raises:
        DatasetError: files are missing, damaged, or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files = _locate(self.path)
        metadata = [_read_metadata(file) for file in self._files]
        self._names: list[list[str]] = [each["names"] for each in metadata]
        self.model = metadata[0]["model"]
        """Fingerprint of the model that made them."""
        self.model_name = metadata[0]["model_name"]
        """What that model was called."""
        self.precision = metadata[0]["precision"]
        """In which its networks computed, which takes latents back exactly; None where a file does not say."""
        for file, each in zip(self._files, metadata):
            if each["model"] != self.model:
                raise DatasetError(f"{file}: made by another model than {self._files[0]}; encode the images again.")

    @property
    def names(self) -> list[str]:
        """Of the images."""
        return [name for names in self._names for name in names]

    def __len__(self) -> int:
        return sum(map(len, self._names))

    def labels(self) -> Tensor | None:
        """The classes of a class-conditional model under which the images were encoded, (N,), int64; None of others.

        Raises:
            DatasetError: a file is damaged.
        """
        parts = []
        for file, names in zip(self._files, self._names):
            with opened_tensors(file, _damaged) as tensors:
                if _LABELS not in tensors.keys():
                    return None
                parts.append(tensors.get_tensor(_LABELS))
            if parts[-1].shape != (len(names),):
                raise _damaged(file, f"it should hold labels of {len(names)} images")
        return torch.cat(parts)

    def batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        """Latents of at most ``batch_size`` images at a time, finest level first, on the CPU.

        Raises:
            DatasetError: a file is damaged.
        """
        for file, names in zip(self._files, self._names):
            with opened_tensors(file, _damaged) as tensors:
                keys = sorted((key for key in tensors.keys() if key.startswith("latent.")),
                              key=lambda key: int(key.removeprefix("latent.")))
                slices = [tensors.get_slice(key) for key in keys]
                if not slices or any(part.get_shape()[:1] != [len(names)] for part in slices):
                    raise _damaged(file, f"it should hold latents of {len(names)} images")
                for start in range(0, len(names), batch_size):
                    yield [part[start:start + batch_size] for part in slices]


def save_latents(
    tensors: Mapping[str, Tensor], path: Path, identity: dict[str, str], names: Sequence[str]
) -> None:
    """Writes one file.

    Args:
        tensors: as the module describes them.
        path: file to write.
        identity: of the model: "model", "model_name" and what else may be worth knowing.
        names: of the images.

    Raises:
        OSError: it cannot be written.
    """
    save_tensors(tensors, path, _FORMAT | identity | {"names": json.dumps(names)})


def save_index(path: Path, files: Sequence[Path]) -> None:
    """Writes the list of ``files`` that together are what was to be ``path``."""
    with replacing(_index(path)) as temporary:
        temporary.write_text(json.dumps(_FORMAT | {"files": [file.name for file in files]}, indent=2) + "\n")


def check_free(path: Path) -> None:
    """Makes sure that latents can be written to ``path``.

    Raises:
        ConfigError: the name does not end in .safetensors, or there are such files.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: the name has to end in .safetensors.")
    for taken in (path, _index(path), *path.parent.glob(f"{_escaped(path.stem)}-?????-of-?????.safetensors")):
        if os.path.lexists(taken):
            raise ConfigError(f"{taken}: already exists; give the latents another name.")


def numbered(path: Path, number: int, count: int) -> Path:
    """The file that is ``number``, from 1, of ``count``."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}.safetensors")


def _escaped(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def _locate(path: Path) -> list[Path]:
    """The safetensors files that ``path`` stands for."""
    index = path if path.name.endswith(".index.json") else _index(path)
    if path.is_file() and path != index:
        return [path]
    if not index.is_file():
        raise DatasetError(f"{path}: no such file; give what hflow-fast encode wrote.")
    try:
        content = json.loads(index.read_bytes())
        known = {key: content.get(key) for key in _FORMAT} == _FORMAT
        files = [index.with_name(Path(name).name) for name in content["files"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(index, str(error)) from error
    if not known or not files:
        raise DatasetError(f"{index}: not an index of latents of this version of hflow_fast.")
    return files


def _read_metadata(file: Path) -> dict[str, Any]:
    with opened_tensors(file, _damaged) as tensors:
        metadata = tensors.metadata() or {}
    if {key: metadata.get(key) for key in _FORMAT} != _FORMAT:
        raise DatasetError(f"{file}: not latents of this version of hflow_fast; give what hflow-fast encode wrote.")
    try:
        names = json.loads(metadata["names"])
        return {"model": metadata["model"], "model_name": metadata["model_name"],
                "precision": metadata.get("precision"), "names": list(map(str, names))}
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(file, f"its metadata: {error}") from error


def _damaged(file: Path, reason: str) -> DatasetError:
    return DatasetError(f"{file}: damaged or not a file of latents ({reason}); encode the images again.")
