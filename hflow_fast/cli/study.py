"""``hflow-fast study``: the studies of the latent hierarchy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import click

from .options import (batch_size_option, device_option, ema_option, new_file, precision_option, sampling_std,
                      seed_option, std_option, threads_option)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["study"]

_IMAGES = 4

Std = float | tuple[float, ...]


class _Numbers(click.ParamType):
    """Numbers with commas between them, as a tuple."""

    def __init__(self, kind: type[int] | type[float], at_most: float = float("inf")) -> None:
        self.name = "N,N…"
        self._kind = kind
        self._at_most = at_most

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(map(self._kind, value.split(",")))
        except ValueError:
            self.fail(f"{value!r}: give numbers with commas between them.", parameter, context)
        if not all(0 <= number <= self._at_most and number < float("inf") for number in numbers):
            limit = "" if self._at_most == float("inf") else f" and at most {self._at_most:g}"
            self.fail(f"{value!r}: the numbers have to be at least 0{limit}.", parameter, context)
        return numbers


def _picture_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--out", required=True, type=click.Path(path_type=Path), callback=_new_png,
                        help="The .png file to make.")(command)


def _new_png(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    if value.suffix.lower() != ".png":
        raise click.BadParameter(f"{value}: the name has to end in .png.")
    return new_file(context, parameter, value)


def _images_of_user(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument IMAGES, and what is taken of it."""
    for decorate in (
        click.option("--pick", type=_Numbers(int), help="Which of the images, counted from 0: 3,20.  "
                     f"[default: the first {_IMAGES}]"),
        click.option("--part", type=click.Choice(["all", "train", "held-out"]), default="held-out",
                     help="Which images of a dataset."),
        click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return command


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (threads_option, precision_option, device_option, batch_size_option, ema_option):
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
@_images_of_user
@_picture_option
@click.option("--draws", type=click.IntRange(min=2), default=32, help="Samples behind each map.")
@click.option("--std", type=click.FloatRange(min=0), default=1.0, help="Standard deviation of the samples.")
@seed_option
@_model_options
def randomize(
    checkpoint: Path, images: tuple[Path, ...], part: str, pick: tuple[int, ...] | None, out: Path, draws: int,
    std: float, seed: int, ema: bool, batch_size: int, device: str, precision: str | None,
) -> None:
    """Draw one level's latents anew: heat maps of what changes.

    All other latents stay those of the image. The maps show the standard deviation of each pixel, all on one scale.
    """
    from tqdm import tqdm

    from ..inference import studies
    from ..training import load_model

    model, _ = load_model(checkpoint, average=ema, device=device, precision=precision)
    chosen = _read(images, model.resolution, part, pick)
    names = studies.level_names(model)
    with tqdm(total=len(names) * len(chosen) * draws, unit=" images", disable=None) as bar:
        maps = studies.randomize_levels(model, chosen, draws=draws, std=std, seed=seed, batch_size=batch_size,
                                        progress=bar.update)
    out.parent.mkdir(parents=True, exist_ok=True)
    studies.save_heat_maps(chosen, maps, names, out, label="standard deviation; black to white is 1")
    for name, level in zip(names, maps):
        click.echo(f"  {name:>5}  {float(level.mean()):.4f}")
    click.echo(f"{out}: spread of the pixels of {len(chosen)} images by level, {draws} draws; the means are above.")


@study.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_images_of_user
@_picture_option
@click.option("--from", "start", type=click.Choice(["finest", "coarsest"]), default="finest",
              help="The level that is silenced first.")
@_model_options
def zero(
    checkpoint: Path, images: tuple[Path, ...], part: str, pick: tuple[int, ...] | None, out: Path, start: str,
    ema: bool, batch_size: int, device: str, precision: str | None,
) -> None:
    """Set latents to zero, level after level.

    A row for each image: as its latents give it, then without the first level's, without the first two levels' …
    """
    from ..inference import save_png, studies
    from ..training import load_model

    model, _ = load_model(checkpoint, average=ema, device=device, precision=precision)
    chosen = _read(images, model.resolution, part, pick)
    steps = studies.zero_levels(model, chosen, start=start, batch_size=batch_size)
    order = studies.level_names(model)
    if start == "coarsest":
        order.reverse()
    without = [f"without\n{order[0]}" + f" to {name}" * (name != order[0]) for name in order[:-1]]
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(studies.labelled_grid(steps.transpose(0, 1), columns=["all\nlatents", *without, "none"]), out)
    click.echo(f"{out}: {len(chosen)} images, latents set to zero from the {start} level on.")


@study.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_images_of_user
@_picture_option
@click.option("--keep", type=click.Choice(["coarse", "fine"]), default="coarse",
              help="Which side of each cut stays the image's.")
@click.option("--draws", type=click.IntRange(min=1), default=6, help="Samples for each cut.")
@std_option
@seed_option
@_model_options
def hold(
    checkpoint: Path, images: tuple[Path, ...], part: str, pick: tuple[int, ...] | None, out: Path, keep: str,
    draws: int, std: Std | None, seed: int, ema: bool, batch_size: int, device: str, precision: str | None,
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
    chosen = _read(images, model.resolution, part, pick)
    samples = studies.hold_levels(model, chosen, keep=keep, draws=draws, std=std, seed=seed, batch_size=batch_size)
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
@_picture_option
@click.option("--seeds", type=_Numbers(int), default=tuple(range(8)), show_default="0,1 … 7",
              help="A column for each: the first image of hflow-fast sample with this seed.")
@click.option("--stds", type=_Numbers(float), default=(0.3, 0.5, 0.7, 1.0), show_default="0.3,0.5,0.7,1",
              help="A row for each: standard deviations of the latents.")
@_model_options
def seeds(
    checkpoint: Path, out: Path, seeds: tuple[int, ...], stds: tuple[float, ...], ema: bool, batch_size: int,
    device: str, precision: str | None,
) -> None:
    """Sample the same seeds at several standard deviations."""
    from ..inference import save_png, studies
    from ..training import load_model

    model, _ = load_model(checkpoint, average=ema, device=device, precision=precision)
    samples = studies.seed_samples(model, seeds, stds, batch_size=batch_size)
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
@click.option("--steps", type=_Numbers(float, at_most=1), default=(1.0,), show_default="1",
              help="How much of the latents moves, 0 for none: one number, or one per level, finest first.")
@std_option
@seed_option
@_model_options
def walk(
    checkpoint: Path, out: Path, count: int, frames: int, fps: float, turns: int, steps: tuple[float, ...],
    std: Std | None, seed: int, ema: bool, batch_size: int, device: str, precision: str | None,
) -> None:
    """Film a walk through latent space that ends where it began."""
    import math

    from tqdm import tqdm

    from ..inference import check_video_path, image_grid, save_video, studies
    from ..training import load_model

    check_video_path(out)
    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    std = sampling_std(model, config, std)
    levels = len(model.latent_shapes)
    if len(steps) not in (1, levels):
        raise click.BadParameter(f"give one number or {levels}, one per level.", param_hint="--steps")
    walked = studies.random_walk(model, frames=frames, count=count, std=std, seed=seed, turns=turns,
                                 steps=steps if len(steps) > 1 else steps[0], batch_size=batch_size)
    columns = math.ceil(math.sqrt(count))
    pictures = (image_grid(images, columns) for images in tqdm(walked, total=frames, unit=" frames", disable=None))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_video(pictures, out, fps=fps)
    click.echo(f"{out}: {count} walks of {frames} frames.")


def _read(paths: tuple[Path, ...], resolution: int, part: str, pick: tuple[int, ...] | None) -> Tensor:
    """The picked images, (N, 3, R, R), uint8."""
    import torch

    from ..errors import DatasetError
    from ..inference import open_images

    with open_images(paths, resolution, part=part) as found:
        if pick is None:
            pick = tuple(range(min(_IMAGES, len(found))))
        if max(pick) >= len(found):
            raise DatasetError(f"there is no image {max(pick)} among the {len(found)} given; count from 0.")
        images = [batch for position in pick for _, batch in found.batches(range(position, position + 1), 1)]
        if found.skipped:
            name, reason = found.skipped[0]
            raise DatasetError(f"{name}: {reason}; choose other images with --pick.")
    return torch.cat(images)
