"""Random images, each decided by a seed and its own number alone."""

from __future__ import annotations

import json
import os
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import to_uint8
from ..errors import ConfigError
from .graphs import replayed_decoder
from .identity import model_fingerprint
from .images import image_grid, read_png, save_png
from .labels import Labels, in_turn, label_tensors

__all__ = ["draw_latents", "draw_samples", "write_samples"]

Std = float | Sequence[float]

_IN_GRID = 64
_PNG_THREADS = 4
_SETTINGS = "samples.json"


def draw_latents(model: nn.Module, indices: Iterable[int], *, std: Std, seed: int) -> list[Tensor]:
    """The latents of samples, which depend on the seed and each sample's index and on nothing else.

    Neither the other samples drawn with it nor device or process make a difference, so that samples can be drawn in any
    order and anywhere. They are drawn by NumPy on the CPU: PyTorch's generator there uses 32 bits of a seed only, and
    among 50,000 samples two would likely be the same.

    Args:
        model: what will decode them.
        indices: N numbers, each at least 0.
        std: temperature, one number or one per level, as the model's ``latent_stds`` takes it.
        seed: at least 0.

    Returns:
        One tensor (N, C, H, W) for each of ``model.latent_shapes``, of the model's dtype and on its device.
    """
    parameter = next(model.parameters())
    # As a spawn key, the index cannot be taken for the upper half of a large seed.
    generators = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,))) for index in indices]
    latents = []
    for shape, scale in zip(model.latent_shapes, model.latent_stds(std)):
        drawn = np.empty((len(generators), *shape), dtype=np.float32)
        for row, generator in zip(drawn, generators):
            generator.standard_normal(dtype=np.float32, out=row)
        latents.append(torch.from_numpy(drawn).to(parameter) * scale)
    return latents


@torch.no_grad()
def draw_samples(
    model: nn.Module, samples: int | Sequence[int], *, std: Std, seed: int, batch_size: int = 16, labels: Labels = None,
    bits: int = 8,
) -> Tensor:
    """Samples of the model, (N, 3, R, R), uint8, on the CPU.

    The same arguments give the same images, up to rounding, on any device and for any batch size. The global random
    state is left alone.

    Args:
        model: a flow, such as an HFlow or a Glow.
        samples: how many, or which ones; N is short for ``range(N)``.
        std, seed: as :func:`draw_latents` takes them.
        batch_size: images at a time.
        labels: for a class-conditional model: the samples' class, or several that they take in turn, sample i the class
            ``labels[i mod len(labels)]``.
        bits: of the pixel values, 1 to 8: the low 8 − bits, of which a model of fewer bits knows nothing, become 0.
    """
    indices = range(samples) if isinstance(samples, int) else samples
    batches = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)]
    draw = _drawing(model, std, seed, labels, bits)
    images = [draw(batch).cpu() for batch in batches]
    return torch.cat([torch.empty(0, 3, model.resolution, model.resolution, dtype=torch.uint8), *images])


def _drawing(model: nn.Module, std: Std, seed: int, labels: Labels, bits: int) -> Callable[[Sequence[int]], Tensor]:
    """Numbers of samples → their 8-bit images, on the device."""
    if not 1 <= bits <= 8:
        raise ValueError(f"draw_samples: bits must be 1 to 8, got {bits}.")
    in_turn(labels, [0])  # there is one, and all are the model's: said before anything is drawn
    label_tensors(model, labels, 1 if labels is None or isinstance(labels, int) else len(labels))
    decode, dropped = replayed_decoder(model, to_uint8), 8 - bits

    def draw(indices: Sequence[int]) -> Tensor:
        classes = label_tensors(model, in_turn(labels, indices), len(indices))
        return decode(*draw_latents(model, indices, std=std, seed=seed), *classes) >> dropped << dropped

    return draw


@torch.no_grad()
def write_samples(
    model: nn.Module,
    directory: str | os.PathLike[str],
    count: int,
    *,
    std: Std,
    seed: int,
    batch_size: int = 16,
    labels: Labels = None,
    bits: int = 8,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> int:
    """Samples as files: ``000000.png`` … and ``grid.png``, which shows the first 64.

    Files are written as they are drawn, so any number fits into memory. Each is whole or absent, and what is there
    already is not drawn again: an interrupted call goes on where it stopped, and one with a larger ``count`` adds to
    the files. ``samples.json`` says what they are.

    Several processes, each with its own ``rank``, share the work without talking to each other: each draws one
    contiguous part of the indices; the first also draws the grid.

    Args:
        model: a flow, such as an HFlow or a Glow.
        directory: a new or empty folder, or one that has samples of the same model and settings.
        count: number of images.
        std, seed: as :func:`draw_latents` takes them.
        batch_size: images at a time.
        labels, bits: as :func:`draw_samples` takes them.
        rank, world_size: which process this is, from 0, and how many there are.
        progress: show a bar when the standard error is a terminal.

    Returns:
        How many images this call drew for their own files.

    Raises:
        ConfigError: the folder has other things in it.
        OSError: a file cannot be written; those before it are there.
    """
    directory = Path(directory)
    settings: dict[str, Any] = {"std": std, "seed": seed, "labels": labels, "bits": bits}
    draw = _drawing(model, **settings)
    _claim(directory, _record(model, **settings))
    share = range(count * rank // world_size, count * (rank + 1) // world_size)
    missing = [index for index in share if not _path(directory, index).exists()]
    with (
        ThreadPoolExecutor(_PNG_THREADS) as pool,
        tqdm(total=len(share), initial=len(share) - len(missing), unit=" images",
             disable=None if progress else True) as bar,
    ):
        writing: list[Future[None]] = []
        for start in range(0, len(missing), batch_size):
            batch = missing[start:start + batch_size]
            images = draw(batch).cpu()
            _finish(writing)  # the files of the batch before were written while this one was drawn
            writing = [pool.submit(save_png, image, _path(directory, index)) for image, index in zip(images, batch)]
            bar.update(len(batch))
        _finish(writing)
    if rank == 0:
        _write_grid(model, directory, min(count, _IN_GRID), batch_size=batch_size, **settings)
    return len(missing)


def _record(model: nn.Module, std: Std, seed: int, labels: Labels, bits: int) -> dict[str, Any]:
    """What decides the images."""
    record = {"model": model_fingerprint(model), "std": model.latent_stds(std), "seed": seed}
    if labels is not None:
        record["labels"] = [labels] if isinstance(labels, int) else list(map(int, labels))
    if bits < 8:
        record["bits"] = bits
    return record


def _write_grid(model: nn.Module, directory: Path, count: int, **settings: Any) -> None:
    """The grid of the first ``count`` images; those that another process has not written yet are drawn here."""
    images: dict[int, Tensor] = {}
    for index in range(count):
        if _path(directory, index).exists():
            images[index] = read_png(_path(directory, index))
    missing = [index for index in range(count) if index not in images]
    images |= zip(missing, draw_samples(model, missing, **settings))
    columns = int(np.ceil(np.sqrt(count)))
    save_png(image_grid(torch.stack([images[index] for index in range(count)]), columns), directory / "grid.png")


def _path(directory: Path, index: int) -> Path:
    return directory / f"{index:06d}.png"


def _finish(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _claim(directory: Path, settings: dict[str, Any]) -> None:
    """Makes the folder and its ``samples.json``, unless there is one that says the same.

    Several processes may do so at once: the file appears whole, before any image does, and all write the same.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory}: is a file; give the samples another folder.")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / _SETTINGS
    taken = any(not path.name.startswith(f".{_SETTINGS}") for path in directory.iterdir())
    if file.exists():  # asked after `taken`: an image seen there means that its samples.json was there before
        if (differences := _differences(file, settings)):
            raise ConfigError(f"{directory}: holds other samples ({differences}); give these another folder.")
    elif taken:
        raise ConfigError(f"{directory}: already exists and is not empty; give the samples another folder.")
    else:
        temporary = directory / f".{_SETTINGS}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
        temporary.replace(file)


def _differences(file: Path, settings: dict[str, Any]) -> str:
    try:
        found = json.loads(file.read_text())
        pairs = {key: (found.get(key), settings.get(key)) for key in settings | found}
        return ", ".join("another model's" if key == "model" else f"{key} {theirs} instead of {ours}"
                         for key, (theirs, ours) in pairs.items() if theirs != ours)
    except (ValueError, TypeError, AttributeError):
        return f"{file.name} is damaged"
