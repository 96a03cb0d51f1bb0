"""Making a dataset from a folder or a zip of images, or from an HDF5 file of the original."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Iterable, Iterator

import numpy as np
from tqdm import tqdm

from ..errors import DatasetError
from ._building import building
from .dataset import ImageDataset, Manifest, Recipe, Skipped, is_dataset
from .labels import FOLDERS, Labelling, label_folders, label_table
from .sources import SourceFile, SourceRow, fingerprint, open_source, printable

__all__ = ["create_dataset"]

Files = list[SourceFile] | list[SourceRow]

_TRAIN = "train"
_HELD_OUT = ("held_out", "test", "val")
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes and resizes without the interpreter lock


def create_dataset(
    source: str | Path,
    out: str | Path,
    resolution: int,
    *,
    name: str | None = None,
    held_out: float = 0.05,
    seed: int = 0,
    labels: str | Path | None = None,
    progress: bool = False,
) -> ImageDataset:
    """Makes a dataset from all images of a zip or a folder, as :func:`~hflow_fast.data.decode.decode_image` reads them,
    or of an HDF5 file in the layout of the original HFlow.

    When the source has a folder ``train`` and one of ``held_out``, ``test``, ``val`` at the top (or inside the one
    folder that holds everything), these are the split and other files are skipped. Otherwise images are held out by a
    hash of their pixels and the seed, so that equal images are on the same side.

    Files that are not images, are damaged, or have none of the labels asked for, are skipped and listed in
    ``manifest.skipped``. ``out`` appears when all is done, and an existing one is never touched. Until then there are
    ``.<out>.tmp`` and ``.<out>.lock`` beside it; what a killed process left of them is removed by the next one. Memory
    does not grow with the images, only with the list of their names.

    Args:
        source: a zip, a folder or an HDF5 file.
        out: the folder to make.
        resolution: side of the square images in pixels, at least 1.
        name: of the dataset inside an HDF5 file, where it holds more than one.
        held_out: fraction of distinct images to hold out, in (0, 1); at least one is.
        seed: of that choice.
        labels: "folders": the folder right above an image is its class; or the path of a table, which gives classes or
            attributes (:func:`~hflow_fast.data.labels.label_table`).
        progress: show a bar when the standard error is a terminal.

    Returns:
        The dataset; the one that is there already if it was made from the same source in the same way.

    Raises:
        DatasetError: the source or the table cannot be read or has no usable image, there is but one class, ``out``
            exists or is being made by another process, or the disk is full.
        ValueError: a parameter outside its range.
    """
    source, out = Path(source), Path(out)
    if resolution < 1:
        raise ValueError(f"create_dataset: resolution must be at least 1, got {resolution}.")
    if not 0 < held_out < 1:
        raise ValueError(f"create_dataset: held_out must be between 0 and 1, got {held_out}.")
    if out.resolve().is_relative_to(source.resolve()):
        raise DatasetError(f"{out}: lies inside the source {source}; choose a place outside it.")

    with open_source(source, name) as files:
        folders = _split_folders(files)
        labelling = _labelling(labels, source, files, bool(folders)) if labels is not None else None
        recipe = Recipe(
            source_fingerprint=fingerprint(files),
            resolution=resolution,
            split="folders" if folders else "content",
            held_out_fraction=None if folders else held_out,
            seed=None if folders else seed,
            labels=labelling.recipe if labelling else None,
        )
        if os.path.lexists(out):
            return _existing(out, recipe)
        with building(out) as folder:
            if os.path.lexists(out):  # another process was quicker
                return _existing(out, recipe)
            _write(folder, source, files, folders, labelling, recipe, progress)
    return ImageDataset.open(out)


def _existing(out: Path, recipe: Recipe) -> ImageDataset:
    """The dataset at ``out`` if it is the one asked for."""
    advice = "it is left as it is; choose another place"
    if not is_dataset(out):
        raise DatasetError(f"{out}: exists and is not a dataset; {advice}.")
    dataset = ImageDataset.open(out)
    asked, found = recipe.model_dump(), dataset.manifest.recipe.model_dump()
    differences = [
        {"source_fingerprint": "another source or its files have changed", "labels": "other labels"}.get(
            key, f"{key} {found[key]} instead of {asked[key]}")
        for key in asked if asked[key] != found[key]
    ]
    if differences:
        raise DatasetError(f"{out}: holds another dataset ({', '.join(differences)}); {advice}.")
    dataset.verify()
    return dataset


def _labelling(labels: str | Path, source: Path, files: Files, split: bool) -> Labelling:
    names = [file.name for file in files]
    if str(labels) != FOLDERS:
        return label_table(Path(labels), names)
    if files and isinstance(files[0], SourceRow):
        raise DatasetError(f"{source}: an HDF5 file has no folders to take labels from; give a table of them.")
    return label_folders(names, _is_wrapped(names) + split)


def _write(
    folder: Path, source: Path, files: Files, folders: dict[str, bool | None], labelling: Labelling | None,
    recipe: Recipe, progress: bool,
) -> None:
    names: list[str] = []
    skipped: list[Skipped] = []
    hashes: list[bytes] = []
    digest = hashlib.sha256()
    with open(folder / "images.npy", "wb") as array:
        array.write(_header(0, recipe.resolution))
        for file, result in _decoded(files, folders, labelling, recipe.resolution, progress):
            if isinstance(result, str):
                skipped.append(Skipped(name=file.name, reason=result))
                continue
            pixels = result.tobytes()
            array.write(pixels)
            digest.update(pixels)
            names.append(file.name)
            hashes.append(hashlib.blake2b(pixels, digest_size=16, key=str(recipe.seed).encode()).digest())
        array.seek(0)
        array.write(_header(len(names), recipe.resolution))
        _sync(array)

    if not names:
        raise DatasetError(f"{source}: no image in it. {_summary(skipped)}")
    if folders:
        held_out = [position for position, name in enumerate(names) if folders[name]]
    else:
        held_out = _held_out_by_hash(hashes, recipe.held_out_fraction)
    if not 0 < len(held_out) < len(names):
        raise DatasetError(f"{source}: {len(names) - len(held_out)} training and {len(held_out)} held-out images; "
                           f"give at least one of each, not equal to each other. {_summary(skipped)}")
    about = None
    if labelling:
        labels, about = labelling.array(names)
        with open(folder / "labels.npy", "wb") as file:
            np.save(file, labels)
            _sync(file)
    manifest = Manifest(recipe=recipe, source=printable(str(source)), sha256=digest.hexdigest(), names=names,
                        held_out=held_out, skipped=skipped, labels=about)
    # Without labels, the file is what versions that know none can read.
    left_out = {} if labelling else {"recipe": {"labels"}, "labels": True}
    with open(folder / "dataset.json", "wb") as file:
        file.write(manifest.model_dump_json(indent=1, exclude=left_out).encode())
        _sync(file)


def _decoded(
    files: Files, folders: dict[str, bool | None], labelling: Labelling | None, resolution: int, progress: bool
) -> Iterator[tuple[SourceFile | SourceRow, np.ndarray | str]]:
    """Every file with its pixels, or with the reason why it has none, in order and a few at a time."""

    def decode(file: SourceFile | SourceRow) -> np.ndarray | str:
        if folders and folders[file.name] is None:
            return f"in neither {_TRAIN}/ nor {'/, '.join(_HELD_OUT)}/"
        if labelling and file.name not in labelling.values:
            return labelling.missing
        try:
            return file.pixels(resolution)
        except Exception as error:  # zip members and decoders fail in many ways, none of which may end the run
            return str(error) or type(error).__name__

    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(files), unit=" images", disable=None if progress else True) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pillow's remarks on files that it can read
        for start in range(0, len(files), 8 * _THREADS):
            chunk = files[start : start + 8 * _THREADS]
            for file, result in zip(chunk, pool.map(decode, chunk)):
                yield file, result
                bar.update()


def _split_folders(files: Files) -> dict[str, bool | None]:
    """For each name whether it is held out by its folder, None if it is in neither; empty if folders say nothing."""
    paths = {file.name: PurePosixPath(file.name).parts for file in files}
    wrapped = _is_wrapped(paths)
    tops = {name: parts[wrapped] if len(parts) > wrapped + 1 else "" for name, parts in paths.items()}
    if _TRAIN not in tops.values() or set(_HELD_OUT).isdisjoint(tops.values()):
        return {}
    return {name: top in _HELD_OUT if top == _TRAIN or top in _HELD_OUT else None for name, top in tops.items()}


def _is_wrapped(names: Iterable[str]) -> bool:
    """Whether one folder at the top holds everything."""
    return len({PurePosixPath(name).parts[0] for name in names}) == 1


def _held_out_by_hash(hashes: list[bytes], fraction: float) -> list[int]:
    distinct = sorted(set(hashes))
    wanted = max(1, round(fraction * len(distinct)))
    chosen = set(distinct[: min(wanted, len(distinct) - 1)])
    return [position for position, value in enumerate(hashes) if value in chosen]


def _header(count: int, resolution: int) -> bytes:
    """The header of a .npy file of so many images; NumPy pads it to the same length for any count."""
    header = io.BytesIO()
    shape = (count, resolution, resolution, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _summary(skipped: list[Skipped]) -> str:
    first = [f"{item.name}: {item.reason}" for item in skipped[:3]] + ["…"] * (len(skipped) > 3)
    return f"Files skipped: {len(skipped)}{' (' + '; '.join(first) + ')' if first else ''}."
