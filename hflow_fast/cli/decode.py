"""``hflow-fast decode``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import (batch_size_option, chosen_label, device_option, ema_option, label_option, precision_option,
                      threads_option)

__all__ = ["decode"]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("latents", type=click.Path(path_type=Path))
@click.option("--out", "directory", required=True, type=click.Path(path_type=Path), help="Folder for the images.")
@label_option
@ema_option
@batch_size_option
@device_option
@precision_option
@threads_option
def decode(
    checkpoint: Path, latents: Path, directory: Path, class_name: str | None, ema: bool, batch_size: int, device: str,
    precision: str | None,
) -> None:
    """Turn latents written by hflow-fast encode back into images.

    CHECKPOINT is that of the model that encoded them: a run's folder or a checkpoint file. Images come back as
    exactly as can be in the precision and at the batch size of encoding, which are the defaults, and under the class
    of encoding; --label takes another one for all.
    """
    from ..inference import LatentFiles, decode_to_folder
    from ..training import load_model

    model, config = load_model(checkpoint, average=ema, device=device,
                               precision=precision or LatentFiles(latents).precision)
    label = chosen_label(model, config, class_name, required=False)
    count = decode_to_folder(model, latents, directory, label=label, batch_size=batch_size, model_name=str(checkpoint),
                             progress=True)
    click.echo(f"{directory}: {count} images.")
