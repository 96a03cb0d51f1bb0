"""``hflow-fast interpolate``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import (batch_size_option, chosen_label, device_option, ema_option, label_option, new_file,
                      precision_option, sampling_std, std_option, threads_option)

__all__ = ["interpolate"]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, metavar="[FIRST SECOND]", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), callback=new_file,
              help="The file to make: .mp4, .gif, or .png for all frames side by side.")
@click.option("--seeds", nargs=2, type=click.IntRange(min=0), help="Go from the first sample of one seed to that of "
              "another, instead of between two images.")
@std_option
@click.option("--frames", type=click.IntRange(min=2), default=48, help="Frames from the first image to the second.")
@click.option("--fps", type=click.FloatRange(min=0.1, max=240), default=24, help="Frames per second.")
@click.option("--loop", is_flag=True, help="Go there and back.")
@click.option("--mode", type=click.Choice(["lerp", "slerp"]), default="lerp", help="Straight, or at constant distance "
              "from zero.")
@click.option("--space", type=click.Choice(["z", "y"]), default="z", help="Mix all latents; or, of an HFlow, the "
              "endblock's code instead of its latent.")
@label_option
@ema_option
@batch_size_option
@device_option
@precision_option
@threads_option
def interpolate(
    checkpoint: Path, images: tuple[Path, ...], out: Path, seeds: tuple[int, int] | None,
    std: float | tuple[float, ...] | None, frames: int, fps: float, loop: bool, mode: str, space: str,
    class_name: str | None, ema: bool, batch_size: int, device: str, precision: str | None,
) -> None:
    """Go from one image to another through a model's latents.

    CHECKPOINT is a run's folder or a checkpoint file; FIRST and SECOND are images of any common format, cut to the
    central square and resized for the model.

    \b
    hflow-fast interpolate runs/demo first.jpg second.jpg --out way.mp4 --loop
    hflow-fast interpolate runs/demo --seeds 1 2 --out way.png --frames 8
    """
    import torch
    from tqdm import tqdm

    from .. import inference
    from ..training import load_model

    if (len(images) == 2) == (seeds is not None) or len(images) not in (0, 2):
        raise click.UsageError("give two images, or two seeds with --seeds.")
    if out.suffix.lower() not in (".mp4", ".gif", ".png"):
        raise click.BadParameter(f"{out}: the name has to end in .mp4, .gif or .png.", param_hint="--out")
    as_strip = out.suffix.lower() == ".png"
    if not as_strip:
        inference.check_video_path(out)
    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    label = chosen_label(model, config, class_name)
    if space == "y" and not hasattr(model, "endblock"):
        raise click.BadParameter("this model has no endblock, whose code y is; leave it out.", param_hint="--space")
    if seeds is None:
        ends = [inference.latents_of(model, inference.read_image(path, model.resolution)[None], label)
                for path in images]
    else:
        std = sampling_std(model, config, std)
        ends = [inference.draw_latents(model, [0], std=std, seed=seed) for seed in seeds]
    drawn = inference.interpolate(model, *ends, frames, mode=mode, space=space, batch_size=batch_size,
                                  labels=label)
    pictures = (image for image, in tqdm(drawn, total=frames, unit=" frames", disable=None))
    if loop:
        pictures = inference.there_and_back(pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    if as_strip:
        strip = torch.stack(list(pictures))
        inference.save_png(inference.image_grid(strip, len(strip)), out)
    else:
        inference.save_video(pictures, out, fps=fps)
    first, second = images or (f"seed {seed}" for seed in seeds)
    click.echo(f"{out}: {first} → {second}{' and back' * loop}, {frames} frames one way.")
