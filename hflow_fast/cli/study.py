"""``hflow-fast study``: the studies of the latent hierarchy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import click

from .options import (batch_size_option, chosen_label, device_option, ema_option, label_option, new_file,
                      pixel_bits, precision_option, sampling_std, seed_option, std_option, threads_option)
from .pictures import Numbers, images_of_user, picture_option, read_images

__all__ = ["study"]

Std = float | tuple[float, ...]


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (threads_option, precision_option, device_option, batch_size_option, ema_option, label_option):
        command = decorate(command)
    return command


@click.group()
def study() -> None:
    """Look into the hierarchy of a model's latents.

    CHECKPOINT is a run's folder or a checkpoint file. IMAGES are image files, folders or zips of images, or a dataset
    made by hflow-fast dataset.
    """


@study.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@images_of_user
@picture_option
@click.option("--draws", type=click.IntRange(min=2), default=32, help="Samples behind each map.")
@click.option("--std", type=click.FloatRange(min=0), default=1.0, help="Standard deviation of the samples.")
@seed_option
@_model_options
def randomize(
    checkpoint: Path, images: tuple[Path, ...], part: str, pick: tuple[int, ...] | None, out: Path, draws: int,
    std: float, seed: int, class_name: str | None, ema: bool, batch_size: int, device: str, precision: str | None,
) -> None:
    """Draw one level's latents anew: heat maps of what changes.

    All other latents stay those of the image. The maps show the standard deviation of each pixel, all on one scale.
    """
    from tqdm import tqdm

    from ..inference import studies
    from ..training import load_model

    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    label = chosen_label(model, config, class_name)
    chosen, _ = read_images(images, model.resolution, part, pick)
    names = studies.level_names(model)
    with tqdm(total=len(names) * len(chosen) * draws, unit=" images", disable=None) as bar:
        maps = studies.randomize_levels(model, chosen, draws=draws, std=std, seed=seed, batch_size=batch_size,
                                        label=label, progress=bar.update)
    out.parent.mkdir(parents=True, exist_ok=True)
    studies.save_heat_maps(chosen, maps, names, out, label="standard deviation; black to white is 1")
    for name, level in zip(names, maps):
        click.echo(f"  {name:>5}  {float(level.mean()):.4f}")
    click.echo(f"{out}: spread of the pixels of {len(chosen)} images by level, {draws} draws; the means are above.")


@study.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@images_of_user
@picture_option
@click.option("--from", "start", type=click.Choice(["finest", "coarsest"]), default="finest",
              help="The level that is silenced first.")
@_model_options
def zero(
    checkpoint: Path, images: tuple[Path, ...], part: str, pick: tuple[int, ...] | None, out: Path, start: str,
    class_name: str | None, ema: bool, batch_size: int, device: str, precision: str | None,
) -> None:
    """Set latents to zero, level after level.

    A row for each image: as its latents give it, then without the first level's, without the first two levels' …
    """
    from ..inference import save_png, studies
    from ..training import load_model

    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    label = chosen_label(model, config, class_name)
    chosen, _ = read_images(images, model.resolution, part, pick)
    steps = studies.zero_levels(model, chosen, start=start, batch_size=batch_size, label=label)
    order = studies.level_names(model)
    if start == "coarsest":
        order.reverse()
    without = [f"without\n{order[0]}" + f" to {name}" * (name != order[0]) for name in order[:-1]]
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(studies.labelled_grid(steps.transpose(0, 1), columns=["all\nlatents", *without, "none"]), out)
    click.echo(f"{out}: {len(chosen)} images, latents set to zero from the {start} level on.")


@study.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@images_of_user
@picture_option
@click.option("--keep", type=click.Choice(["coarse", "fine"]), default="coarse",
              help="Which side of each cut stays the image's.")
@click.option("--draws", type=click.IntRange(min=1), default=6, help="Samples for each cut.")
@std_option
@seed_option
@_model_options
def hold(
    checkpoint: Path, images: tuple[Path, ...], part: str, pick: tuple[int, ...] | None, out: Path, keep: str,
    draws: int, std: Std | None, seed: int, class_name: str | None, ema: bool, batch_size: int, device: str,
    precision: str | None,
) -> None:
    """Hold some levels' latents and draw the others anew.

    For each image, a row for each cut through the hierarchy: the image, then samples that share the latents on one side
    of the cut.
    """
    import torch

    from ..inference import save_png, studies
    from ..training import load_model

    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    std = sampling_std(model, config, std)
    label = chosen_label(model, config, class_name)
    chosen, _ = read_images(images, model.resolution, part, pick)
    samples = studies.hold_levels(model, chosen, keep=keep, draws=draws, std=std, seed=seed, batch_size=batch_size,
                                  label=label)
    originals = chosen[:, None, None].expand(-1, samples.shape[1], 1, -1, -1, -1)
    names = studies.level_names(model)
    if keep == "coarse":
        held = [f"{names[cut]} to\n{names[-1]}" if cut < len(names) - 1 else names[-1] for cut in range(1, len(names))]
    else:
        held = [f"{names[0]} to\n{names[cut - 1]}" if cut > 1 else names[0] for cut in range(1, len(names))]
    grid = studies.labelled_grid(torch.cat([originals, samples], dim=2).flatten(0, 1), rows=held * len(chosen),
                                 columns=["image", *[f"sample {number}" for number in range(1, draws + 1)]])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid, out)
    click.echo(f"{out}: {len(chosen)} images; the levels named at the left are held, the others sampled.")


@study.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@picture_option
@click.option("--seeds", type=Numbers(int), default=tuple(range(8)), show_default="0,1 … 7",
              help="A column for each: the first image of hflow-fast sample with this seed.")
@click.option("--stds", type=Numbers(float), default=(0.3, 0.5, 0.7, 1.0), show_default="0.3,0.5,0.7,1",
              help="A row for each: standard deviations of the latents.")
@_model_options
def seeds(
    checkpoint: Path, out: Path, seeds: tuple[int, ...], stds: tuple[float, ...], class_name: str | None, ema: bool,
    batch_size: int, device: str, precision: str | None,
) -> None:
    """Sample the same seeds at several standard deviations."""
    from ..inference import save_png, studies
    from ..training import load_model

    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    label = chosen_label(model, config, class_name)
    samples = studies.seed_samples(model, seeds, stds, batch_size=batch_size, label=label, bits=pixel_bits(config))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(studies.labelled_grid(samples, rows=[f"std\n{std:g}" for std in stds],
                                   columns=[f"seed {seed}" for seed in seeds]), out)
    click.echo(f"{out}: {len(seeds)} seeds at {len(stds)} standard deviations.")


@study.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), callback=new_file,
              help="The .mp4 or .gif file to make.")
@click.option("--count", type=click.IntRange(min=1), default=4, help="Walks side by side.")
@click.option("--frames", type=click.IntRange(min=2), default=192, help="Frames until the walk is back.")
@click.option("--fps", type=click.FloatRange(min=0.1, max=240), default=24, help="Frames per second.")
@click.option("--turns", type=click.IntRange(min=1), default=3, help="How much happens on the way.")
@click.option("--steps", type=Numbers(float, at_most=1), default=(1.0,), show_default="1",
              help="How much of the latents moves, 0 for none: one number, or one per level, finest first.")
@std_option
@seed_option
@_model_options
def walk(
    checkpoint: Path, out: Path, count: int, frames: int, fps: float, turns: int, steps: tuple[float, ...],
    std: Std | None, seed: int, class_name: str | None, ema: bool, batch_size: int, device: str,
    precision: str | None,
) -> None:
    """Film a walk through latent space that ends where it began."""
    import math

    from tqdm import tqdm

    from ..inference import check_video_path, image_grid, save_video, studies
    from ..training import load_model

    check_video_path(out)
    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    std = sampling_std(model, config, std)
    label = chosen_label(model, config, class_name)
    levels = len(model.latent_shapes)
    if len(steps) not in (1, levels):
        raise click.BadParameter(f"give one number or {levels}, one per level.", param_hint="--steps")
    walked = studies.random_walk(model, frames=frames, count=count, std=std, seed=seed, turns=turns,
                                 steps=steps if len(steps) > 1 else steps[0], batch_size=batch_size, label=label)
    columns = math.ceil(math.sqrt(count))
    pictures = (image_grid(images, columns) for images in tqdm(walked, total=frames, unit=" frames", disable=None))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_video(pictures, out, fps=fps)
    click.echo(f"{out}: {count} walks of {frames} frames.")
