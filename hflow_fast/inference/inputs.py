"""Images of a user, wherever they lie, as a model takes them."""

from __future__ import annotations

import os
import zipfile
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Literal, Sequence

import torch
from torch import Tensor

from ..data import ImageDataset
from ..data.dataset import is_dataset
from ..data.decode import decode_image
from ..data.sources import SourceFile, open_source
from ..errors import DatasetError

__all__ = ["ImageSet", "Part", "open_images", "read_image"]

Part = Literal["all", "train", "held-out"]


class ImageSet:
    """Images that are read one after the other; see :func:`open_images`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """Of every image, also of files that may turn out not to be one."""
        self.labels: list[int | None] = []
        """The class of every image, where a dataset says it."""
        self.skipped: list[tuple[str, str]] = []
        """Names of the files passed over so far, and why."""
        self._read: list[Callable[[], Tensor]] = []

    def add(self, name: str, read: Callable[[], Tensor], label: int | None = None) -> None:
        """One more image (3, R, R), uint8."""
        self.names.append(name)
        self.labels.append(label)
        self._read.append(read)

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, positions: range, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        """Names and images (N, 3, R, R), uint8, N ≤ ``batch_size``, of the positions whose files are images.

        Raises:
            DatasetError: an image that was asked for by its own name cannot be read.
        """
        for found, images in self.numbered_batches(positions, batch_size):
            yield [self.names[position] for position in found], images

    def numbered_batches(self, positions: range, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """As :meth:`batches`, with positions instead of names."""
        for start in range(0, len(positions), batch_size):
            batch = {}
            for position in positions[start:start + batch_size]:
                try:
                    batch[position] = self._read[position]()
                except _Skipped as reason:
                    self.skipped.append((self.names[position], str(reason)))
            if batch:
                yield list(batch), torch.stack(list(batch.values()))


def read_image(path: str | os.PathLike[str], resolution: int) -> Tensor:
    """An image file of any format that Pillow reads, as :func:`~hflow_fast.data.decode.decode_image` reads it.

    Args:
        path: the file.
        resolution: side R of the result in pixels.

    Returns:
        (3, R, R), uint8.

    Raises:
        DatasetError: it is missing or not an image.
    """
    try:
        return _decode(Path(path).read_bytes(), resolution)
    except OSError as error:
        raise DatasetError(f"{os.fspath(path)}: cannot be read ({error.strerror}); give an image file.") from error
    except ValueError as error:
        raise DatasetError(f"{os.fspath(path)}: {error}; give an image file.") from error


@contextmanager
def open_images(
    paths: Sequence[str | os.PathLike[str]], resolution: int, *, part: Part = "all"
) -> Iterator[ImageSet]:
    """The images at some places, in the order given; nothing is read yet.

    Args:
        paths: image files, folders and zips of images, and datasets made by ``hflow-fast dataset``. Files that are not
            images are skipped inside folders and zips.
        resolution: side of the images. Those of a dataset have to have it; others are cut to their central square and
            resized.
        part: which images of a dataset.

    Raises:
        DatasetError: a place is missing, cannot be read or holds no file, or is a dataset of another resolution.
    """
    with ExitStack() as stack:
        images = ImageSet()
        for path in map(Path, paths):
            before = len(images)
            if is_dataset(path):
                _add_dataset(images, path, resolution, part)
            elif path.is_dir() or zipfile.is_zipfile(path):
                for file in stack.enter_context(open_source(path)):
                    images.add(file.name, partial(_read_or_skip, file, resolution))
            elif path.exists():
                images.add(path.name, partial(read_image, path, resolution))
            else:
                raise DatasetError(f"{path}: no such file or folder; give images, folders or zips of images, "
                                   "or a dataset.")
            if len(images) == before:
                raise DatasetError(f"{path}: there are no images in it.")
        yield images


class _Skipped(Exception):
    """A file among many is not an image."""


def _add_dataset(images: ImageSet, path: Path, resolution: int, part: Part) -> None:
    dataset = ImageDataset.open(path)
    if dataset.resolution != resolution:
        raise DatasetError(f"{path}: its images have {dataset.resolution} px, the model's {resolution} px; "
                           f"make a dataset with --resolution {resolution}, or give the images themselves.")
    parts = {"all": [dataset.train, dataset.held_out], "train": [dataset.train], "held-out": [dataset.held_out]}
    for chosen in parts[part]:
        classes = chosen.labels.tolist() if dataset.classes else [None] * len(chosen)
        for index, (name, label) in enumerate(zip(chosen.names, classes)):
            images.add(name, partial(chosen.__getitem__, index), label)


def _read_or_skip(file: SourceFile, resolution: int) -> Tensor:
    try:
        return _decode(file.read(), resolution)
    except Exception as error:  # zip members and decoders fail in many ways, none of which may end the work
        raise _Skipped(str(error) or type(error).__name__) from error


def _decode(data: bytes, resolution: int) -> Tensor:
    return torch.from_numpy(decode_image(data, resolution)).permute(2, 0, 1).contiguous()
