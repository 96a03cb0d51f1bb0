"""The images of a folder, a zip or an HDF5 file, before anything is known about them."""

from __future__ import annotations

import hashlib
import os
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from ..errors import DatasetError
from .decode import decode_image, fit_square
from .hdf5 import is_hdf5, open_hdf5

__all__ = ["SourceFile", "SourceRow", "fingerprint", "open_source", "printable"]

_MAX_BYTES = 2**29
"""No single picture is larger; a zip bomb is."""


@dataclass(frozen=True, order=True)
class SourceFile:
    """One file of a source."""

    name: str
    """Path inside the source, with ``/``; bytes that are not UTF-8 are escaped."""
    size: int
    stamp: int
    """Changes when the content does: the CRC-32 in a zip, the modification time (ns) in a folder."""
    _read: Callable[[], bytes] = field(compare=False, repr=False)

    def read(self) -> bytes:
        """The content.

        Raises:
            ValueError: larger than 512 MiB.
            OSError, RuntimeError, zipfile.BadZipFile: it cannot be read.
        """
        if self.size > _MAX_BYTES:
            raise ValueError(f"{self.size / 2**20:.0f} MiB are too many for one picture")
        return self._read()

    def pixels(self, resolution: int) -> np.ndarray:
        """(R, R, 3), uint8, as :func:`~hflow_fast.data.decode.decode_image` gives them.

        Raises:
            ValueError: not a usable image; the text is the reason.
            OSError, RuntimeError, zipfile.BadZipFile: it cannot be read.
        """
        return decode_image(self.read(), resolution)


@dataclass(frozen=True, order=True)
class SourceRow:
    """One image of an HDF5 file, whose pixels need no decoding."""

    name: str
    """``<name of the dataset>/X_DATA[<number>]``."""
    size: int
    stamp: int
    """The modification time (ns) of the file."""
    _read: Callable[[], np.ndarray] = field(compare=False, repr=False)

    def pixels(self, resolution: int) -> np.ndarray:
        """(R, R, 3), uint8: as stored, or cropped to the central square and resized.

        Raises:
            ValueError: all its values are 0: the original's importer reserves all rows before it writes them.
            OSError: it cannot be read.
        """
        row = self._read()
        if not row.any():
            raise ValueError("every value is 0, as in a row that was never written")
        return fit_square(Image.fromarray(row), resolution)


@contextmanager
def open_source(path: Path, name: str | None = None) -> Iterator[list[SourceFile] | list[SourceRow]]:
    """All files of a folder (recursive, links to folders not followed) or a zip, or all images of an HDF5 file.

    Files are sorted by name; hidden ones and the ``__MACOSX`` folder of zips made on a Mac are left out. Rows of an
    HDF5 file are in its order.

    Args:
        path: a folder, a zip or an HDF5 file.
        name: of the dataset inside an HDF5 file, where it holds more than one.

    Raises:
        DatasetError: ``path`` is missing, or neither a folder nor a readable zip or HDF5 file.
    """
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder; give a zip or a folder of images, or an HDF5 file.")
    if is_hdf5(path):
        stamp = path.stat().st_mtime_ns
        with open_hdf5(path, name) as rows:
            yield [SourceRow(printable(f"{rows.name}[{number}]"), rows.row_bytes, stamp, partial(rows.read, number))
                   for number in range(len(rows))]
        return
    if name is not None:
        raise DatasetError(f"{path}: not an HDF5 file, so it has no dataset {name!r} inside; leave the name out.")
    if path.is_dir():
        yield _visible(_folder_files(path))
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: not a zip, or a damaged one ({error}); download or copy it again, "
                           "or give a folder of images or an HDF5 file.") from error
    with archive:
        yield _visible(
            SourceFile(printable(info.filename), info.file_size, info.CRC, partial(_read_member, archive, info))
            for info in archive.infolist()
            if not info.is_dir()
        )


def fingerprint(files: Iterable[SourceFile | SourceRow]) -> str:
    """SHA-256 over names, sizes and stamps: tells whether a source has changed without reading its content."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.stamp}\n".encode())
    return digest.hexdigest()


def _folder_files(folder: Path) -> Iterator[SourceFile]:
    def fail(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions.") from error

    for root, _, names in os.walk(folder, onerror=fail):
        for name in names:
            path = Path(root, name)
            # A broken link or a pipe has no content to speak of; reading it gives the reason it is skipped.
            status = path.stat() if path.is_file() else None
            yield SourceFile(
                printable(path.relative_to(folder).as_posix()),
                status.st_size if status else 0,
                status.st_mtime_ns if status else 0,
                partial(_read_regular, path),
            )


def _read_regular(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError("not a regular file")
    return path.read_bytes()


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A little at a time: reading all at once inflates what is there, however much more than the zip claims."""
    with archive.open(info) as file:
        return b"".join(iter(partial(file.read, 4096), b""))


def printable(name: str) -> str:
    """The name with bytes that are not UTF-8 escaped, so that it can be written to a file."""
    return name.encode("utf-8", "backslashreplace").decode()


def _visible(files: Iterable[SourceFile]) -> list[SourceFile]:
    def hidden(file: SourceFile) -> bool:
        return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(file.name).parts)

    return sorted(file for file in files if not hidden(file))
