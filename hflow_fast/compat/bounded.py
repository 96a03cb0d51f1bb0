"""A file that is read only as far as it goes: every claimed length is checked before anything is allocated."""

from __future__ import annotations

import os
from typing import BinaryIO

from ..errors import CheckpointError

__all__ = ["BoundedFile"]

_LARGEST_READ = 2**20
"""Bytes of one piece of text or of one number in a pickle; class sources, the longest, are some ten thousand."""


class BoundedFile:
    """An open file with the three methods that :mod:`pickletools` wants, and lengths checked against its size.

    Errors are CheckpointErrors that say where the file ends too early; the caller names the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes, at most 1 MiB."""
        self._check(count)
        if count > _LARGEST_READ:
            raise CheckpointError(f"a text or number of {count:,} bytes at byte {self.tell():,}; none is that long.")
        return self._file.read(count)

    def readline(self) -> bytes:
        """A line of at most 1 MiB, or what is left of the file."""
        return self._file.readline(_LARGEST_READ)

    def skip(self, count: int) -> int:
        """Goes past ``count`` bytes; returns the position of the first of them."""
        self._check(count)
        position = self.tell()
        self._file.seek(count, os.SEEK_CUR)
        return position

    def number(self, width: int) -> int:
        """An unsigned little-endian integer of ``width`` bytes."""
        return int.from_bytes(self.read(width), "little")

    def content(self, position: int, count: int) -> bytearray:
        """``count`` bytes from ``position``, of any length that the file has; the place of reading stays."""
        before = self.tell()
        self._file.seek(position)
        self._check(count)
        data = bytearray(count)
        if self._file.readinto(data) != count:
            raise CheckpointError("the file became shorter while it was read.")
        self._file.seek(before)
        return data

    def _check(self, count: int) -> None:
        left = self.size - self.tell()
        if count > left:
            raise CheckpointError(f"cut off or damaged: {count:,} bytes are announced at byte {self.tell():,}, "
                                  f"but only {left:,} follow.")
