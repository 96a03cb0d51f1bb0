"""Classes and attributes of images, from the folders of their source or from a table beside it."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..errors import DatasetError

__all__ = ["FOLDERS", "Labelling", "Labels", "label_folders", "label_table"]

FOLDERS = "folders"
"""Stands for the folders in the place of a table's path."""
_CLASS_COLUMNS = "label", "class"
_SHOWN = 3

Value = str | tuple[bool, ...]
"""The class of an image, or its attributes."""


class Labels(BaseModel):
    """What ``labels.npy`` holds: int64 (N,), positions in ``names``; or bool (N, A), a column for each name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["classes", "attributes"]
    names: list[str]
    """Of the classes, or of the attributes."""
    sha256: str
    """Of the array, without its header."""


@dataclass(frozen=True)
class Labelling:
    """The labels of a source's images, before it is known which of them can be read."""

    recipe: str
    """``folders``, or the SHA-256 of the table."""
    values: Mapping[str, Value]
    """By the name of the file."""
    attributes: Sequence[str] | None
    """Names of the attributes; None for classes."""
    missing: str
    """Why a file has no value."""

    def array(self, names: Sequence[str]) -> tuple[np.ndarray, Labels]:
        """The labels of these files, all of which have one.

        Raises:
            DatasetError: they are of one class.
        """
        values = [self.values[name] for name in names]
        if self.attributes is not None:
            kind, of = "attributes", list(self.attributes)
            array = np.array(values, dtype=np.bool_).reshape(len(values), len(of))
        else:
            kind, of = "classes", self._classes(values)
            if len(of) < 2:
                raise DatasetError(f"all images are of one class, {of[0]!r}; give images of several classes, or leave "
                                   "out --labels.")
            numbers = {name: number for number, name in enumerate(of)}
            array = np.array([numbers[value] for value in values], dtype=np.int64)
        return array, Labels(kind=kind, names=of, sha256=hashlib.sha256(array.tobytes()).hexdigest())

    def _classes(self, values: Sequence[Value]) -> list[str]:
        """In the order of their names, as torchvision has those of folders; numbers of a table by their size."""
        distinct = set(values)
        if self.recipe != FOLDERS and all(name.isdecimal() for name in distinct):
            return sorted(distinct, key=lambda name: (int(name), name))
        return sorted(distinct)


def label_folders(names: Sequence[str], root: int) -> Labelling:
    """The folder right above an image is its class, as in torchvision's ``ImageFolder``.

    Args:
        names: paths inside the source.
        root: so many folders at the top are no classes: one that holds everything, and those that are the split.
    """
    paths = {name: PurePosixPath(name).parts for name in names}
    values = {name: parts[-2] for name, parts in paths.items() if len(parts) >= root + 2}
    return Labelling(FOLDERS, values, None, "in no folder that could be its class")


def label_table(path: Path, names: Sequence[str]) -> Labelling:
    """Labels by a table with a line of titles and then one row for each image, which begins with its name.

    A table of the two columns ``name,label`` gives classes; any other one attributes: a column for each, of -1 and 1 or
    of 0 and 1. CelebA's own ``list_attr_celeba.txt``, with the number of rows above the titles, is read, too. A name is
    the path inside the source, or the file's own name where that is enough to tell.

    Args:
        path: of the CSV file.
        names: paths inside the source.

    Raises:
        DatasetError: it is missing, cannot be understood, or none of its rows is for one of the files.
    """
    try:
        content = path.read_bytes()
        titles, rows = _parse(content.decode("utf-8-sig"))
    except OSError as error:
        reason = error.strerror or error
        raise DatasetError(f"{path}: cannot be read ({reason}); give a CSV file, or the word {FOLDERS}.") from error
    except (ValueError, csv.Error) as error:
        raise DatasetError(f"{path}: not a table of labels ({error}).") from error
    attributes = None
    values: dict[str, Value]
    if len(titles) == 2 and titles[1].lower() in _CLASS_COLUMNS:
        values = {name: cells[0] for name, cells in rows.items() if cells[0]}
    else:
        attributes = titles[1:]
        values = dict(zip(rows, _truths(path, list(rows.values()), attributes)))
    return Labelling(hashlib.sha256(content).hexdigest(), _by_file(path, values, names), attributes,
                     f"no label in {path.name}")


def _parse(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The titles, and the other cells of each row by its first."""
    lines = text.splitlines()
    if lines and lines[0].strip().isdecimal():
        table = [["name", *lines[1].split()] if len(lines) > 1 else [], *(line.split() for line in lines[2:])]
    else:
        table = list(csv.reader(io.StringIO(text)))
    table = [[cell.strip() for cell in row] for row in table if row]
    if not table or len(table[0]) < 2:
        raise ValueError("its first line has to hold titles: name,label, or name and one for each attribute")
    titles = table[0]
    rows: dict[str, list[str]] = {}
    for row in table[1:]:
        if len(row) != len(titles):
            raise ValueError(f"the row of {row[0]!r} has {len(row)} cells, the titles are {len(titles)}")
        if row[0] in rows:
            raise ValueError(f"there are two rows of {row[0]!r}")
        rows[row[0]] = row[1:]
    if len(set(titles)) < len(titles):
        raise ValueError("two columns have one title")
    return titles, rows


def _truths(path: Path, rows: Sequence[Sequence[str]], attributes: Sequence[str]) -> list[tuple[bool, ...]]:
    found = {cell for row in rows for cell in row}
    if not (found <= {"-1", "1"} or found <= {"0", "1"}):
        if len(attributes) == 1:
            raise DatasetError(f"{path}: the title of a column of classes has to be label, not {attributes[0]!r}; "
                               "attributes are -1 and 1, or 0 and 1.")
        odd = sorted(found - {"-1", "0", "1"})[:_SHOWN] or ["-1", "0"]
        raise DatasetError(f"{path}: attributes are -1 and 1, or 0 and 1, but there are {', '.join(map(repr, odd))}; "
                           "a table of classes has the two columns name,label.")
    return [tuple(cell == "1" for cell in row) for row in rows]


def _by_file(path: Path, values: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """The values by whole paths inside the source."""
    files: dict[str, list[str]] = defaultdict(list)
    for name in names:
        key = name if name in values else PurePosixPath(name).name
        if key in values:
            files[key].append(name)
    if not files:
        of_rows, of_files = (", ".join([*list(some)[:_SHOWN], *["…"] * (len(some) > _SHOWN)]) or "none"
                             for some in (values, names))
        raise DatasetError(f"{path}: none of its rows is for a file of the source; the rows are of {of_rows}, the "
                           f"files are {of_files}.")
    for key, several in files.items():
        if len(several) > 1:
            raise DatasetError(f"{path}: {key!r} could be {' or '.join(several[:_SHOWN])}; give the paths inside the "
                               "source.")
    return {several[0]: values[key] for key, several in files.items()}
