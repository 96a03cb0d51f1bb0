"""``hflow-fast sample``."""

from __future__ import annotations

import math
from pathlib import Path

import click

from .options import device_option, threads_option

__all__ = ["sample"]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", "directory", required=True, type=click.Path(path_type=Path), help="Folder for the images.")
@click.option("--n", "count", type=click.IntRange(min=1), default=16, help="Number of images.")
@click.option("--std", type=click.FloatRange(min=0), help="Standard deviation of the latents: smaller is cleaner, "
              "larger more varied.  [default: SAMPLE_BASE_SIGMA of the configuration]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="The same seed gives the same images.")
@click.option("--ema/--no-ema", default=True, help="Take the moving average of the weights, or the last ones.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Images at a time.")
@device_option
@threads_option
def sample(
    checkpoint: Path, directory: Path, count: int, std: float | None, seed: int, ema: bool, batch_size: int,
    device: str,
) -> None:
    """Draw images from a trained model.

    CHECKPOINT is a run's folder or a checkpoint file. Writes grid.png and one PNG per image.
    """
    from ..errors import ConfigError
    from ..training import TrainConfig, load_model
    from ..inference import draw_samples, image_grid, save_png

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: already exists; give new images another --out.")
    model, config = load_model(checkpoint, average=ema, device=device)
    if std is None:
        std = TrainConfig.from_config(config).output.sample_base_sigma
    images = draw_samples(model, count, std=std, seed=seed, batch_size=batch_size)
    directory.mkdir(parents=True, exist_ok=True)
    digits = max(4, len(str(count - 1)))
    for index, image in enumerate(images):
        save_png(image, directory / f"{index:0{digits}d}.png")
    save_png(image_grid(images, math.ceil(math.sqrt(count))), directory / "grid.png")
    click.echo(f"{directory}: {count} images (std {std:g}, seed {seed}) and grid.png.")
