"""Latents on disk: images → safetensors files → images.

A file holds ``latent.0`` (N, C, H, W), the finest level's, ``latent.1`` … to the endblock's; ``log_det`` (N,) of the
flows; and ``max_error`` and ``mean_error`` (N,), by which the images that the latents give differ from the originals,
in steps of 8 bits. Its metadata say which model made it, and the images' names. What is too large for one file becomes
several, and an index that lists them.
"""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .._files import replacing
from ..data import from_uint8, to_uint8
from ..errors import ConfigError, DatasetError
from .identity import model_fingerprint
from .images import save_png
from .inputs import ImageSet, Part, open_images

__all__ = ["Encoded", "LatentFiles", "RoundTrip", "decode_to_folder", "encode_to_file"]

_FORMAT = {"format": "hflow_fast latents", "version": "1"}
_FILE_BYTES = 2**28
_LARGEST_ELEMENT = 8  # float64, of latents of networks coarser than float32
_STEPS = 256


@dataclass(frozen=True)
class RoundTrip:
    """How an image comes back from its latents."""

    name: str
    max_error: float
    """Largest difference of a pixel's value, in steps of 8 bits."""
    mean_error: float
    """Mean difference."""
    exact: bool
    """All 8-bit values come back."""


@dataclass
class Encoded:
    """What :func:`encode_to_file` did."""

    files: list[Path] = field(default_factory=list)
    """The safetensors files."""
    images: list[RoundTrip] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Names of files that are not images, and why."""


def encode_to_file(
    model: nn.Module,
    images: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    part: Part = "all",
    batch_size: int = 16,
    images_per_file: int | None = None,
    model_name: str = "",
    progress: bool = False,
) -> Encoded:
    """Writes the latents of images, and decodes them again to see what comes back.

    Pixels are taken in the middle of what their 8-bit values stand for, without noise. The latents of one file are in
    memory at a time.

    Args:
        model: a hierarchical model.
        images: places, as :func:`~hflow_fast.inference.open_images` takes them.
        path: the file to make, ending in .safetensors. Where one is not enough, the files are
            ``<name>-00001-of-00003.safetensors`` and so on, and ``<path>.index.json`` lists them.
        part: which images of a dataset: "all", "train" or "held-out".
        batch_size: images at a time.
        images_per_file: at most; None stands for 256 MiB.
        model_name: what to call the model in messages, for example the path of its checkpoint.
        progress: show a bar when the standard error is a terminal.

    Raises:
        ConfigError: the name ends otherwise, or there are such files.
        DatasetError: an image that was asked for cannot be read, or there are none.
        OSError: a file cannot be written.
    """
    path = Path(path)
    _check_free(path)
    identity = {"model": model_fingerprint(model), "model_name": model_name, "resolution": str(model.resolution),
                "bits": "8"}
    if hasattr(model, "precision"):
        identity["precision"] = model.precision
    if images_per_file is None:
        per_image = sum(map(math.prod, model.latent_shapes)) * _LARGEST_ELEMENT
        images_per_file = max(1, _FILE_BYTES // per_image)
    with (
        open_images(images, model.resolution, part=part) as source,
        tqdm(total=len(source), unit=" images", disable=None if progress else True) as bar,
    ):
        done = Encoded(skipped=source.skipped)
        count = -(-len(source) // images_per_file)
        for number in range(count):
            positions = range(number * images_per_file, min((number + 1) * images_per_file, len(source)))
            tensors, round_trips = _encode(model, source, positions, batch_size, bar)
            if round_trips:
                done.files.append(path if count == 1 else _numbered(path, number + 1, count))
                done.images += round_trips
                names = json.dumps([image.name for image in round_trips])
                _save(tensors, done.files[-1], _FORMAT | identity | {"names": names})
    if not done.files:
        name, reason = done.skipped[0]
        raise DatasetError(f"none of {len(done.skipped)} files is an image; the first, {name}: {reason}.")
    if count > 1:
        with replacing(_index(path)) as temporary:
            temporary.write_text(json.dumps(_FORMAT | {"files": [file.name for file in done.files]}, indent=2) + "\n")
    return done


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

    def batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        """Latents of at most ``batch_size`` images at a time, finest level first, on the CPU.

        Raises:
            DatasetError: a file is damaged.
        """
        for file, names in zip(self._files, self._names):
            with _opened(file) as tensors:
                keys = sorted((key for key in tensors.keys() if key.startswith("latent.")),
                              key=lambda key: int(key.removeprefix("latent.")))
                slices = [tensors.get_slice(key) for key in keys]
                if not slices or any(part.get_shape()[:1] != [len(names)] for part in slices):
                    raise _damaged(file, f"it should hold latents of {len(names)} images")
                for start in range(0, len(names), batch_size):
                    yield [part[start:start + batch_size] for part in slices]


@torch.no_grad()
def decode_to_folder(
    model: nn.Module,
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    model_name: str = "",
    progress: bool = False,
) -> int:
    """Writes the images of latents as PNG files, ``000000_<name>.png`` and so on, in their order.

    Args:
        model: the model that encoded them.
        path: as :class:`LatentFiles` takes it.
        directory: a new or empty folder.
        batch_size: images at a time.
        model_name: what to call the model in messages.
        progress: show a bar when the standard error is a terminal.

    Returns:
        How many.

    Raises:
        ConfigError: the folder is not empty.
        DatasetError: the latents cannot be read, or are of another model.
        OSError: an image cannot be written.
    """
    directory, latents = Path(directory), LatentFiles(path)
    fingerprint = model_fingerprint(model)
    if latents.model != fingerprint:
        raise DatasetError(
            f"{latents.path}: encoded by {_called(latents.model_name, latents.model)}, which is not "
            f"{_called(model_name, fingerprint)}. Take the model that encoded them: the same checkpoint, from before "
            "any further training, and the same choice of averaged or last weights.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: already exists and is not empty; give the images another folder.")
    directory.mkdir(parents=True, exist_ok=True)
    names, device = iter(enumerate(latents.names)), next(model.parameters()).device
    with tqdm(total=len(latents), unit=" images", disable=None if progress else True) as bar:
        for batch in latents.batches(batch_size):
            _check_shapes(model, batch, latents.path)
            images = to_uint8(model.decode([part.to(device) for part in batch])[0])
            for image in images.cpu():
                index, name = next(names)
                save_png(image, directory / f"{index:06d}_{_safe_stem(name)}.png")
            bar.update(len(images))
    return len(latents)


@torch.no_grad()
def _encode(
    model: nn.Module, source: ImageSet, positions: range, batch_size: int, bar: tqdm
) -> tuple[dict[str, Tensor], list[RoundTrip]]:
    """The tensors of one file, and how its images come back."""
    batches: list[dict[str, Tensor]] = []
    round_trips = []
    for image_names, images in source.batches(positions, batch_size):
        x = from_uint8(images).to(next(model.parameters()))
        latents, log_det = model.encode(x)
        decoded = model.decode(latents)[0]
        errors = (decoded - x).abs().flatten(1) * _STEPS
        exact = (to_uint8(decoded).cpu() == images).flatten(1).all(dim=1) & decoded.isfinite().flatten(1).all(dim=1).cpu()
        tensors = {f"latent.{level}": latent for level, latent in enumerate(latents)}
        tensors |= {"log_det": log_det, "max_error": errors.amax(dim=1), "mean_error": errors.mean(dim=1)}
        batches.append({name: tensor.cpu() for name, tensor in tensors.items()})
        round_trips += map(RoundTrip, image_names, *(batches[-1][key].tolist() for key in ("max_error", "mean_error")),
                           exact.tolist())
        bar.update(len(images))
    names = batches[0].keys() if batches else ()
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}, round_trips


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error}).") from error
        temporary.chmod(mode)  # safetensors makes files that nobody but their owner can read


def _check_free(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: the name has to end in .safetensors.")
    for taken in (path, _index(path), *path.parent.glob(f"{_escaped(path.stem)}-?????-of-?????.safetensors")):
        if os.path.lexists(taken):
            raise ConfigError(f"{taken}: already exists; give the latents another name.")


def _escaped(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _numbered(path: Path, number: int, count: int) -> Path:
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}.safetensors")


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def _locate(path: Path) -> list[Path]:
    """The safetensors files that ``path`` stands for."""
    index = path if path.name.endswith(".index.json") else _index(path)
    if path.is_file() and path != index:
        return [path]
    if not index.is_file():
        raise DatasetError(f"{path}: no such file; give what hflow-fast encode has written.")
    try:
        content = json.loads(index.read_bytes())
        known = {key: content.get(key) for key in _FORMAT} == _FORMAT
        files = [index.with_name(Path(name).name) for name in content["files"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(index, str(error)) from error
    if not known or not files:
        raise DatasetError(f"{index}: not an index of latents of this version of hflow_fast.")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise _damaged(file, str(error)) from error


def _read_metadata(file: Path) -> dict[str, Any]:
    with _opened(file) as tensors:
        metadata = tensors.metadata() or {}
    if {key: metadata.get(key) for key in _FORMAT} != _FORMAT:
        raise DatasetError(f"{file}: not latents of this version of hflow_fast; give what hflow-fast encode has written.")
    try:
        names = json.loads(metadata["names"])
        return {"model": metadata["model"], "model_name": metadata["model_name"],
                "precision": metadata.get("precision"), "names": list(map(str, names))}
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(file, f"its metadata: {error}") from error


def _damaged(file: Path, reason: str) -> DatasetError:
    return DatasetError(f"{file}: damaged or not a file of latents ({reason}); encode the images again.")


def _check_shapes(model: nn.Module, latents: list[Tensor], path: Path) -> None:
    shapes = [tuple(latent.shape[1:]) for latent in latents]
    if shapes != list(map(tuple, model.latent_shapes)):
        raise DatasetError(f"{path}: latents of shapes {shapes}, this model's are {list(model.latent_shapes)}; "
                           "encode the images again.")


def _called(name: str, fingerprint: str) -> str:
    return f"{name or 'a model'} (weights {fingerprint[:12]})"


def _safe_stem(name: str) -> str:
    """The file's name without folders and suffix; names come from a file that anyone may have written."""
    return re.sub(r"[^\w.-]", "_", Path(name).stem)[:100]
