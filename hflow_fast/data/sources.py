"""The files of a folder or a zip, before anything is known about them."""

from __future__ import annotations

import hashlib
import os
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Callable, Iterable, Iterator

from ..errors import DatasetError

__all__ = ["SourceFile", "fingerprint", "open_source", "printable"]

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


@contextmanager
def open_source(path: Path) -> Iterator[list[SourceFile]]:
    """All files of a folder (recursive, links to folders not followed) or a zip, sorted by name.

    Hidden files and the ``__MACOSX`` folder of zips made on a Mac are left out.

    Raises:
        DatasetError: ``path`` is missing, or neither a folder nor a readable zip.
    """
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder; give a zip or a folder of images.")
    if path.is_dir():
        yield _visible(_folder_files(path))
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: not a zip, or a damaged one ({error}); "
                           "download or copy it again, or give a folder of images.") from error
    with archive:
        yield _visible(
            SourceFile(printable(info.filename), info.file_size, info.CRC, partial(archive.read, info))
            for info in archive.infolist()
            if not info.is_dir()
        )


def fingerprint(files: Iterable[SourceFile]) -> str:
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


def printable(name: str) -> str:
    """The name with bytes that are not UTF-8 escaped, so that it can be written to a file."""
    return name.encode("utf-8", "backslashreplace").decode()


def _visible(files: Iterable[SourceFile]) -> list[SourceFile]:
    def hidden(file: SourceFile) -> bool:
        return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(file.name).parts)

    return sorted(file for file in files if not hidden(file))
