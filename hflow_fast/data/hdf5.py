"""HDF5 files in the layout of the original HFlow's importer.

Such a file has one group per dataset, and in it the array ``X_DATA``, uint8 (N, R, R, 3). The rows are read by the HDF5
library, but only after the array has been found to be what it claims, in this file and in nothing else.
"""

from __future__ import annotations

import math
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

import numpy as np

from ..errors import DatasetError

if TYPE_CHECKING:
    import h5py

__all__ = ["Rows", "is_hdf5", "open_hdf5"]

_ARRAY = "X_DATA"
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BLOCK = 4 * 2**20
"""Bytes that are read at once, where the file's chunks do not ask for more."""
_MAX_BLOCK = 256 * 2**20
_MAX_ROWS = 5_000_000
"""Each has a name in memory and in ``dataset.json``."""
_FILTERS = {1: "gzip", 2: "shuffle", 3: "Fletcher-32", 32000: "LZF"}
"""The ones that are part of every h5py. Any other would be looked for in plugin folders."""


class Rows:
    """The images of one array, read in blocks, of which the two newest are kept: enough for reading in order.

    Args:
        array: uint8 (N, H, W, 3).
        block: rows per block.
        name: of the array inside the file.
    """

    def __init__(self, array: h5py.Dataset, block: int, name: str) -> None:
        self.name = name
        self.row_bytes = math.prod(array.shape[1:])
        self._array = array
        self._count = len(array)
        self._block = block
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def read(self, number: int) -> np.ndarray:
        """(H, W, 3), uint8. Several threads may read at a time.

        Raises:
            OSError: the file is damaged there.
        """
        start = number - number % self._block
        with self._lock:
            if start not in self._kept:
                block = self._array[start : start + self._block]
                if len(self._kept) == 2:
                    self._kept.pop(min(self._kept))
                self._kept[start] = block
            return self._kept[start][number - start]


def is_hdf5(path: Path) -> bool:
    """Whether the file begins like an HDF5 file; h5py is not needed to tell."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(_SIGNATURE)) == _SIGNATURE
    except OSError:
        return False  # whoever opens it next says why it cannot be read


@contextmanager
def open_hdf5(path: Path, name: str | None = None) -> Iterator[Rows]:
    """The images of an HDF5 file of the original.

    Args:
        path: the file.
        name: of the dataset; None where the file holds just one.

    Raises:
        DatasetError: h5py is missing; the file is damaged; it has no such dataset; the array is not uint8 (N, H, W, 3),
            or not all in the file; or it cannot be read in bounded memory.
    """
    try:
        import h5py
    except ImportError:
        raise DatasetError(f"{path}: reading HDF5 needs h5py; pip install 'hflow_fast[hdf5]'.") from None
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise _damaged(path, error) from error
    with file:
        try:
            rows = _rows(path, file["/"], name)
        except (OSError, RuntimeError, KeyError, TypeError) as error:  # all of them h5py's, for damaged structures
            raise _damaged(path, error) from error
        yield rows


def _rows(path: Path, root: h5py.Group, name: str | None) -> Rows:
    import h5py

    if name is None:
        name = _only_name(path, root)
    group = root
    parts = [part for part in name.split("/") if part] + [_ARRAY]
    where = "/".join(parts)
    for part in parts:
        if not isinstance(group, h5py.Group) or not group.id.links.exists(os.fsencode(part)):
            raise DatasetError(f"{path}: no dataset {name!r}; {_what_there_is(root)}")
        if not _is_hard(group, part):
            raise _refused(path, where, "a link, possibly to another file")
        group = group[part]
    if not isinstance(group, h5py.Dataset):
        raise DatasetError(f"{path}: {where} is not an array; {_what_there_is(root)}")
    return Rows(group, _checked(path, where, group), where)


def _checked(path: Path, where: str, array: h5py.Dataset) -> int:
    """Rows per block of an array that may be read."""
    import h5py

    layout = array.id.get_create_plist()
    # These two first: asking a virtual array for its shape opens the files that it is put together from.
    if layout.get_layout() == h5py.h5d.VIRTUAL:
        raise _refused(path, where, "a virtual array, whose pixels are in other files")
    if layout.get_external_count():
        raise _refused(path, where, f"stored in another file ({layout.get_external(0)[0].decode(errors='replace')})")
    filters = [layout.get_filter(i) for i in range(layout.get_nfilters())]
    for code, *_, label in filters:
        if code not in _FILTERS:
            text = label.decode(errors="replace") or "unnamed"
            raise _refused(path, where, f"compressed by filter {code} ({text}); only {', '.join(_FILTERS.values())} "
                                        "are read. Repack it with h5repack -f NONE")
    shape, dtype = array.shape, array.dtype
    if shape is None or len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise DatasetError(f"{path}: {where} holds {dtype} {shape}, but images are uint8 (N, R, R, 3), 0 to 255, with "
                           "the channels last; write them so, or give a folder of images.")
    count, height, width, _ = shape
    if not count * height * width:
        raise DatasetError(f"{path}: {where} holds no images: its shape is {shape}.")
    if count > _MAX_ROWS:
        raise DatasetError(f"{path}: {where} claims {count:,} images, more than {_MAX_ROWS:,}; split the file.")
    row_bytes = height * width * 3
    rows = max(1, _BLOCK // row_bytes)
    if array.chunks:
        _check_chunks(path, where, array)
        rows = max(1, rows // array.chunks[0]) * array.chunks[0]
    elif (array.id.get_offset() or 0) + count * row_bytes > path.stat().st_size:
        raise _missing(path, where)
    rows = min(rows, count)
    if rows * row_bytes > _MAX_BLOCK:
        raise DatasetError(f"{path}: {where} can only be read {rows} images of {height} × {width} at a time, which takes "
                           f"more than {_MAX_BLOCK // 2**20} MiB; repack it with h5repack -l CONTI.")
    return rows


def _check_chunks(path: Path, where: str, array: h5py.Dataset) -> None:
    if math.prod(array.chunks) > _MAX_BLOCK:
        raise DatasetError(f"{path}: {where} is stored in chunks {array.chunks} of more than {_MAX_BLOCK // 2**20} MiB; "
                           "repack it with h5repack -l CONTI.")
    if array.id.get_num_chunks() < math.prod(-(-size // part) for size, part in zip(array.shape, array.chunks)):
        raise _missing(path, where)


def _only_name(path: Path, root: h5py.Group) -> str:
    names = _names(root)
    if len(names) != 1:
        raise DatasetError(f"{path}: {_what_there_is(root)}")
    return names[0]


def _names(root: h5py.Group) -> list[str]:
    """The datasets that the original's importer may have made."""
    import h5py

    def has_array(name: str) -> bool:
        if not _is_hard(root, name) or root.get(name, getclass=True) is not h5py.Group:
            return False
        group = root[name]  # its links live no longer than it does
        return group.id.links.exists(_ARRAY.encode())

    return [name for name in root if has_array(name)]


def _is_hard(group: h5py.Group, part: str) -> bool:
    """Whether the name is an object of this file, as told without following it."""
    import h5py

    return group.id.links.get_info(os.fsencode(part)).type == h5py.h5l.TYPE_HARD


def _what_there_is(root: h5py.Group) -> str:
    names = _names(root)
    if not names:
        return ("it holds no datasets of the original HFlow, which are groups with an array X_DATA; "
                "give a folder or a zip of images.")
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"it holds {shown}; choose one with --name."


def _refused(path: Path, where: str, reason: str) -> DatasetError:
    return DatasetError(f"{path}: {where} is {reason}; give a file that holds the pixels itself.")


def _missing(path: Path, where: str) -> DatasetError:
    return DatasetError(f"{path}: {where} is larger than what was written of it; make or copy the file again.")


def _damaged(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path}: cannot be read as HDF5 ({error}); copy or make the file again.")
