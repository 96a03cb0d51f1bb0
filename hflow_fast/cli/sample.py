"""``hflow-fast sample``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .options import (batch_size_option, chosen_label, device_option, ema_option, pixel_bits, precision_option,
                      sampling_std, seed_option, std_option, threads_option)

__all__ = ["sample"]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", "directory", required=True, type=click.Path(path_type=Path), help="Folder for the images.")
@click.option("--n", "--count", "count", type=click.IntRange(min=1), default=16,
              help="Number of images. Under torchrun, which takes --n for its own, --count.")
@std_option
@seed_option
@click.option("--label", "words", multiple=True, metavar="CLASS", help="Of a class-conditional model: the class, by "
              "name or number. Given several times, the images take the classes in turn.")
@ema_option
@batch_size_option
@device_option
@precision_option
@threads_option
def sample(
    checkpoint: Path, directory: Path, count: int, std: float | tuple[float, ...] | None, seed: int,
    words: tuple[str, ...], ema: bool, batch_size: int, device: str, precision: str | None,
) -> None:
    """Draw images from a trained model.

    CHECKPOINT is a run's folder or a checkpoint file. Writes one PNG per image, and grid.png of the first 64.

    Each image depends on the seed and its number alone, not on device or batch size. The same command again goes on
    where it was interrupted; a larger --n adds images. Under torchrun the processes share the work.
    """
    from ..inference import write_samples
    from ..training import load_model

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    std = sampling_std(model, config, std)
    labels = [chosen_label(model, config, word) for word in words or (None,)]
    drawn = write_samples(model, directory, count, std=std, seed=seed, batch_size=batch_size,
                          labels=None if None in labels else labels, bits=pixel_bits(config), rank=rank,
                          world_size=world_size, progress=rank == 0)
    by = f" by process {rank} of {world_size}" if world_size > 1 else ""
    values = ",".join(f"{value:g}" for value in (std if isinstance(std, tuple) else (std,)))
    click.echo(f"{directory}: {drawn} images drawn{by}, {count} in all (std {values}, seed {seed}).")
