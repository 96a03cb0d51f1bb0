"""``hflow-fast encode``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import (batch_size_option, chosen_label, device_option, ema_option, label_option, precision_option,
                      threads_option)

__all__ = ["encode"]

_SHOWN = 16


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .safetensors file to make.")
@click.option("--part", type=click.Choice(["all", "train", "held-out"]), default="all",
              help="Which images of a dataset.")
@label_option
@ema_option
@batch_size_option
@device_option
@precision_option
@threads_option
def encode(
    checkpoint: Path, images: tuple[Path, ...], out: Path, part: str, class_name: str | None, ema: bool,
    batch_size: int, device: str, precision: str | None,
) -> None:
    """Write the latents of images, and say how well they come back.

    CHECKPOINT is a run's folder or a checkpoint file; IMAGES are image files, folders or zips of images, or datasets
    made by hflow-fast dataset. More than 256 MiB of latents become several files, with an index beside.

    A class-conditional model encodes images under a class: that of --label, or their own where they come from a dataset
    with classes.
    """
    from ..data.dataset import is_dataset
    from ..inference import encode_to_file
    from ..training import load_model

    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    have_own = all(map(is_dataset, images))
    label = chosen_label(model, config, class_name, required=not have_own)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = encode_to_file(model, images, out, part=part, label=label, batch_size=batch_size, model_name=str(checkpoint),
                          progress=True)
    for name, reason in done.skipped[:_SHOWN]:
        click.echo(f"skipped {name}: {reason}", err=True)
    if len(done.skipped) > _SHOWN:
        click.echo(f"… {len(done.skipped)} skipped in all", err=True)
    if len(done.images) <= _SHOWN:
        for image in done.images:
            click.echo(f"  {image.name}: max error {image.max_error:.2g}, mean {image.mean_error:.2g}"
                       f"{'' if image.exact else ', not bit for bit'}")
    files = f" in {len(done.files)} files" if len(done.files) > 1 else ""
    count = len(done.images)
    worst = max(done.images, key=lambda image: image.max_error)
    mean = sum(image.mean_error for image in done.images) / count
    exact = sum(image.exact for image in done.images)
    click.echo(f"{out}: latents of {count} images{files}. Decoded again, {exact} come back bit for bit; "
               f"max error {worst.max_error:.2g} ({worst.name}), mean {mean:.2g} steps of 8 bits.")
