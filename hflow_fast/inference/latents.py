"""Latents on disk: images → safetensors files → images."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import from_uint8, to_uint8
from ..data.classes import number_of_classes
from ..errors import ConfigError, DatasetError
from .graphs import replayed, replayed_decoder
from .identity import model_fingerprint
from .images import safe_stem, save_png
from .inputs import ImageSet, Part, open_images
from .labels import Labels, label_tensors
from .latent_files import LatentFiles, check_free, numbered, save_index, save_latents

__all__ = ["Encoded", "RoundTrip", "decode_to_folder", "encode_to_file"]

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
    label: int | None = None,
    batch_size: int = 16,
    images_per_file: int | None = None,
    model_name: str = "",
    progress: bool = False,
) -> Encoded:
    """Writes the latents of images, and decodes them again to see what comes back.

    Pixels are taken in the middle of what their 8-bit values stand for, without noise. The latents of one file are in
    memory at a time.

    Args:
        model: a flow, such as an HFlow or a Glow.
        images: places, as :func:`~hflow_fast.inference.open_images` takes them.
        path: the file to make, ending in .safetensors. Where one is not enough, the files are
            ``<name>-00001-of-00003.safetensors`` and so on, and ``<path>.index.json`` lists them.
        part: which images of a dataset: "all", "train" or "held-out".
        label: for a class-conditional model: the class of all images; None stands for those of the dataset.
        batch_size: images at a time.
        images_per_file: at most; None stands for 256 MiB.
        model_name: what to call the model in messages, for example the path of its checkpoint.
        progress: show a bar when the standard error is a terminal.

    Raises:
        ConfigError: the name ends otherwise, there are such files, or the model wants a class and the images have none.
        DatasetError: an image that was asked for cannot be read, or there are none.
        OSError: a file cannot be written.
    """
    path = Path(path)
    check_free(path)
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
            tensors, round_trips = _encode(model, source, positions, label, batch_size, bar)
            if round_trips:
                done.files.append(path if count == 1 else numbered(path, number + 1, count))
                done.images += round_trips
                save_latents(tensors, done.files[-1], identity, [image.name for image in round_trips])
    if not done.files:
        name, reason = done.skipped[0]
        raise DatasetError(f"none of {len(done.skipped)} files is an image; the first, {name}: {reason}.")
    if count > 1:
        save_index(path, done.files)
    return done


@torch.no_grad()
def decode_to_folder(
    model: nn.Module,
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    label: int | None = None,
    batch_size: int = 16,
    model_name: str = "",
    progress: bool = False,
) -> int:
    """Writes the images of latents as PNG files, ``000000_<name>.png`` and so on, in their order.

    Args:
        model: the model that encoded them.
        path: as :class:`LatentFiles` takes it.
        directory: a new or empty folder.
        label: for a class-conditional model: the class of all images; None stands for those they were encoded under.
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
    classes = label_tensors(model, latents.labels() if label is None else label, len(latents))
    directory.mkdir(parents=True, exist_ok=True)
    names, device = iter(enumerate(latents.names)), next(model.parameters()).device
    decode = replayed_decoder(model, to_uint8)
    done = 0
    with tqdm(total=len(latents), unit=" images", disable=None if progress else True) as bar:
        for batch in latents.batches(batch_size):
            _check_shapes(model, batch, latents.path)
            now = slice(done, done + len(batch[0]))
            images = decode(*(part.to(device) for part in batch), *(each[now] for each in classes))
            done = now.stop
            for image in images.cpu():
                index, name = next(names)
                save_png(image, directory / f"{index:06d}_{safe_stem(name)}.png")
            bar.update(len(images))
    return len(latents)


@torch.no_grad()
def _encode(
    model: nn.Module, source: ImageSet, positions: range, label: int | None, batch_size: int, bar: tqdm
) -> tuple[dict[str, Tensor], list[RoundTrip]]:
    """The tensors of one file, and how its images come back."""
    batches: list[dict[str, Tensor]] = []
    round_trips = []
    encode, decode = replayed(model, model.encode), replayed_decoder(model)
    for found, images in source.numbered_batches(positions, batch_size):
        x = from_uint8(images).to(next(model.parameters()))
        classes = label_tensors(model, _labels_of(model, source, found, label), len(x))
        latents, log_det = encode(x, *classes)
        decoded = decode(*latents, *classes)
        errors = (decoded - x).abs().flatten(1) * _STEPS
        # A pixel that is not a number becomes black, and may have been black.
        same = (to_uint8(decoded).cpu() == images) & decoded.isfinite().cpu()
        tensors = {f"latent.{level}": latent for level, latent in enumerate(latents)}
        tensors |= {"log_det": log_det, "max_error": errors.amax(dim=1), "mean_error": errors.mean(dim=1)}
        tensors |= {"labels": each for each in classes}
        batches.append({name: tensor.cpu() for name, tensor in tensors.items()})
        round_trips += map(RoundTrip, [source.names[position] for position in found],
                           *(batches[-1][key].tolist() for key in ("max_error", "mean_error")),
                           same.flatten(1).all(dim=1).tolist())
        bar.update(len(images))
    names = batches[0].keys() if batches else ()
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}, round_trips


def _labels_of(model: nn.Module, source: ImageSet, positions: Sequence[int], label: int | None) -> Labels:
    """The class asked for, or, for a model with classes, those of the dataset's images; None where one has none."""
    if label is not None or not number_of_classes(model):
        return label
    labels = [source.labels[position] for position in positions]
    return None if None in labels else labels


def _check_shapes(model: nn.Module, latents: list[Tensor], path: Path) -> None:
    shapes = [tuple(latent.shape[1:]) for latent in latents]
    if shapes != list(map(tuple, model.latent_shapes)):
        raise DatasetError(f"{path}: latents of shapes {shapes}, this model's are {list(model.latent_shapes)}; "
                           "encode the images again.")


def _called(name: str, fingerprint: str) -> str:
    return f"{name or 'a model'} (weights {fingerprint[:12]})"
