"""A dataset on disk: ``images.npy``, memory-mapped, ``dataset.json``, which says what it holds, and perhaps labels."""

from __future__ import annotations

import hashlib
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..errors import DatasetError
from .hdf5 import is_hdf5
from .labels import Labels

__all__ = ["ImageDataset", "Images", "Manifest", "Recipe", "Skipped", "is_dataset"]


class Recipe(BaseModel):
    """All that decides what a dataset holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source_fingerprint: str
    resolution: int = Field(ge=1)
    split: Literal["folders", "content"]
    """``folders``: as the source's own folders say; ``content``: by a hash of the pixels."""
    held_out_fraction: float | None
    """Of a split by content."""
    seed: int | None
    """Of a split by content."""
    labels: str | None = None
    """``folders``, or the SHA-256 of the table that they are from; None without labels."""


class Skipped(BaseModel):
    """A file of the source that is not in the dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    reason: str


class Manifest(BaseModel):
    """The content of ``dataset.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["hflow_fast dataset"] = "hflow_fast dataset"
    version: Literal[1] = 1
    recipe: Recipe
    source: str
    sha256: str
    """Of the pixels, without the header of ``images.npy``."""
    names: list[str]
    held_out: list[int]
    """Positions of the held-out images; all others are for training."""
    skipped: list[Skipped]
    labels: Labels | None = None


class Images:
    """A memory-mapped set of images that is read by indexing.

    ``images[i]`` is a uint8 tensor (3, R, R); a slice, a list or a tensor of N indices gives (N, 3, R, R).
    """

    def __init__(
        self, pixels: np.memmap, positions: np.ndarray, names: list[str], labels: np.ndarray | None = None
    ) -> None:
        self.labels: Tensor | None = None if labels is None else torch.from_numpy(labels[positions])
        """Of all images: the number of each one's class, (N,), int64; or its attributes, (N, A), bool. None where the
        dataset has none. What they are called, the dataset knows."""
        self._pixels = pixels
        self._positions = positions
        self._names = names
        self._file = _open_for_rows(pixels.filename)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int | slice | list[int] | np.ndarray | Tensor) -> Tensor:
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        chosen = self._pixels[self._positions[index]]
        return torch.from_numpy(np.moveaxis(chosen, -1, -3).copy())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image as stored, (R, R, 3)."""
        return self._pixels.shape[1:]

    def read_into(self, index: np.ndarray, out: np.ndarray) -> None:
        """Reads images from the file and not through the memory map, without holding up other threads.

        The disk is told of all images before it is asked for the first, so that one whose pages are not in memory is
        read many times faster than by page faults, and an image that cannot be read is an error, where touching the
        map ends the process.

        Args:
            index: (N,), int64, at least 0.
            out: (N, R, R, 3), uint8, contiguous; its content is replaced.

        Raises:
            DatasetError: an image cannot be read.
        """
        size = math.prod(self.shape)
        offsets = (self._pixels.offset + self._positions[index] * size).tolist()
        try:
            for offset in offsets:
                os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_WILLNEED)
            for offset, image in zip(offsets, out):
                if os.preadv(self._file, [image], offset) != size:
                    raise _damaged(Path(self._pixels.filename), "it has become shorter")
        except OSError as error:
            raise DatasetError(f"{self._pixels.filename}: cannot be read ({error.strerror}).") from error

    @property
    def names(self) -> list[str]:
        """Path of each image inside the source."""
        return [self._names[position] for position in self._positions]


@dataclass(frozen=True)
class ImageDataset:
    """Square RGB images, split into training and held-out ones. See :meth:`open`."""

    path: Path
    manifest: Manifest
    train: Images
    held_out: Images

    @classmethod
    def open(cls, path: str | Path) -> ImageDataset:
        """Opens a dataset made by ``hflow-fast dataset``. Pixels stay on disk until they are indexed.

        Raises:
            DatasetError: the dataset is missing or damaged.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        pixels = _map_pixels(path / "images.npy", manifest)
        is_held_out = np.zeros(len(pixels), dtype=bool)
        is_held_out[manifest.held_out] = True
        labels = None if manifest.labels is None else _read_labels(path / "labels.npy", manifest, manifest.labels)
        split = (Images(pixels, np.flatnonzero(part), manifest.names, labels) for part in (~is_held_out, is_held_out))
        return cls(path, manifest, *split)

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return self.manifest.recipe.resolution

    @property
    def names(self) -> list[str]:
        """Path of every image inside the source, held-out ones included, in the order of ``images.npy``."""
        return self.manifest.names

    @property
    def classes(self) -> list[str]:
        """What the classes are called that are the images' labels; empty where they have none."""
        return self._label_names("classes")

    @property
    def attributes(self) -> list[str]:
        """What the attributes are called that are the images' labels; empty where they have none."""
        return self._label_names("attributes")

    def _label_names(self, kind: str) -> list[str]:
        labels = self.manifest.labels
        return labels.names if labels is not None and labels.kind == kind else []

    @property
    def fingerprint(self) -> str:
        """Equal for datasets with the same images in the same order, the same split and the same labels."""
        facts = f"{self.manifest.sha256} {self.manifest.held_out}"
        if (labels := self.manifest.labels) is not None:
            facts += f" {labels.kind} {labels.names} {labels.sha256}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def verify(self) -> None:
        """Reads all pixels and labels and compares their SHA-256 with those in ``dataset.json``.

        Raises:
            DatasetError: they differ.
        """
        digest = hashlib.sha256()
        for image in _map_pixels(self.path / "images.npy", self.manifest):
            digest.update(image)
        if digest.hexdigest() != self.manifest.sha256:
            raise _damaged(self.path / "images.npy", "its pixels are not those that were written")
        if (labels := self.manifest.labels) is not None:
            array = _read_labels(self.path / "labels.npy", self.manifest, labels)
            if hashlib.sha256(array.tobytes()).hexdigest() != labels.sha256:
                raise _damaged(self.path / "labels.npy", "its labels are not those that were written")


def is_dataset(path: Path) -> bool:
    """Whether there is a dataset, in whatever state, in the folder."""
    return (path / "dataset.json").is_file()


def _read_manifest(path: Path) -> Manifest:
    file = path / "dataset.json"
    if is_hdf5(path):
        raise DatasetError(f"{path}: an HDF5 file has no held-out images and no random access; convert it once with "
                           f"hflow-fast dataset {path} OUT --resolution R and give OUT.")
    if not is_dataset(path):
        what = "not a dataset, dataset.json is missing" if path.exists() else "no such dataset"
        raise DatasetError(f"{path}: {what}; make one with hflow-fast dataset SOURCE OUT --resolution R.")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise _damaged(file, f"{where}: {first['msg']}") from error
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror}).") from error
    if not all(0 <= position < len(manifest.names) for position in manifest.held_out):
        raise _damaged(file, "held_out: positions outside the dataset")
    return manifest


def _map_pixels(file: Path, manifest: Manifest) -> np.ndarray:
    try:
        pixels = np.lib.format.open_memmap(file, mode="r")
    except FileNotFoundError:
        raise _damaged(file, "the file is missing") from None
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    side = manifest.recipe.resolution
    expected = (len(manifest.names), side, side, 3)
    if pixels.shape != expected or pixels.dtype != np.uint8:
        raise _damaged(file, f"it holds {pixels.dtype} {pixels.shape}, dataset.json says uint8 {expected}")
    return pixels


def _read_labels(file: Path, manifest: Manifest, about: Labels) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise _damaged(file, "the file is missing") from None
    except (EOFError, OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    count, classes = len(manifest.names), about.kind == "classes"
    shape, dtype = ((count,), np.int64) if classes else ((count, len(about.names)), np.bool_)
    if array.shape != shape or array.dtype != dtype:
        raise _damaged(file, f"it holds {array.dtype} {array.shape}, dataset.json says {np.dtype(dtype)} {shape}")
    if classes and not ((0 <= array) & (array < len(about.names))).all():
        raise _damaged(file, f"classes outside the {len(about.names)} of dataset.json")
    return array


def _open_for_rows(file: str | Path) -> int:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # what lies behind an image is not the next one
    return descriptor


def _damaged(file: Path, reason: str) -> DatasetError:
    return DatasetError(f"{file}: damaged ({reason}); make the dataset again in a new place with hflow-fast dataset.")
