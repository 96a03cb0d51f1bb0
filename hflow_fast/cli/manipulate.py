"""``hflow-fast manipulate``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import (batch_size_option, chosen_label, device_option, ema_option, label_option, precision_option,
                      threads_option)
from .pictures import Numbers, images_of_user, read_images

if TYPE_CHECKING:
    from torch import nn

    from ..inference import Attribute

__all__ = ["manipulate"]

_FEW = 50


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@images_of_user
@click.option("--out", "directory", required=True, type=click.Path(path_type=Path),
              help="Folder for grid.png, the images and vectors.safetensors.")
@click.option("--positive", multiple=True, type=click.Path(path_type=Path),
              help="Images that have the attribute: a file, folder, zip or dataset; can be repeated.")
@click.option("--negative", multiple=True, type=click.Path(path_type=Path), help="Images that do not; likewise.")
@click.option("--data", type=click.Path(path_type=Path),
              help="Take the training images of this dataset instead, by its labels.")
@click.option("--attribute", "names", multiple=True, metavar="NAME", help="With --data, one of its attributes, or the "
              "class to set against all others; can be repeated. With --positive, what to call it. "
              "With --vectors, which of them.  [default: all]")
@click.option("--vectors", type=click.Path(path_type=Path), help="Take the attributes that an earlier call found: its "
              "vectors.safetensors.")
@click.option("--strengths", type=Numbers(float, at_least=-float("inf")), default=(-1.0, -0.5, 0.0, 0.5, 1.0),
              show_default="-1,-0.5,0,0.5,1", help="How much of the attribute to add; below 0 takes it away.")
@click.option("--factor", type=float, help="How far strength 1 goes, in differences of the two means.  [default: 1.6]")
@label_option
@ema_option
@batch_size_option
@device_option
@precision_option
@threads_option
def manipulate(
    checkpoint: Path, images: tuple[Path, ...], part: str, pick: tuple[int, ...] | None, directory: Path,
    positive: tuple[Path, ...], negative: tuple[Path, ...], data: Path | None, names: tuple[str, ...],
    vectors: Path | None, strengths: tuple[float, ...], factor: float | None, class_name: str | None, ema: bool,
    batch_size: int, device: str, precision: str | None,
) -> None:
    """Add an attribute to images, or take it away.

    An attribute is what images that have it have in common: the mean of their latents minus that of images without it.
    Strength times factor times this difference is added to the latents of IMAGES.

    \b
    hflow-fast manipulate runs/faces me.jpg --positive smiling/ --negative serious/ --out smile
    hflow-fast manipulate runs/faces me.jpg --data data/faces --attribute smiling --attribute old --out both
    hflow-fast manipulate runs/faces you.jpg --vectors both/vectors.safetensors --out again
    """
    import torch

    from .. import inference
    from ..errors import ConfigError
    from ..inference import studies
    from ..inference.images import safe_name, safe_stem
    from ..inference.manipulation import FACTOR
    from ..training import load_model

    if bool(positive or negative) + (data is not None) + (vectors is not None) != 1:
        raise click.UsageError("say where the attribute comes from: --positive and --negative, or --data and "
                               "--attribute, or --vectors.")
    if (positive or negative) and not (positive and negative):
        raise click.UsageError("give images with the attribute (--positive) and without it (--negative).")
    if positive and len(names) > 1:
        raise click.UsageError("--positive and --negative say one attribute; give one name with --attribute.")
    if data is not None and not names:
        raise click.UsageError("say which attributes of --data with --attribute.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: already exists and is not empty; give the images another folder.")
    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    label = chosen_label(model, config, class_name)
    chosen, titles = read_images(images, model.resolution, part, pick)
    if vectors is not None:
        attributes = _known(model, vectors, names)
    elif data is not None:
        attributes = _of_dataset(model, data, names, label, batch_size)
    else:
        attributes = [_of_images(model, positive, negative, names, label, batch_size)]

    for attribute in attributes:
        few = min(attribute.positives, attribute.negatives) < _FEW
        click.echo(f"  {attribute.name}: {attribute.positives:,} images with it, {attribute.negatives:,} without"
                   + "; so few also differ by chance" * few)
    factor = FACTOR if factor is None else factor
    rows = [inference.manipulate(model, chosen, attribute, strengths, factor=factor, label=label, batch_size=batch_size)
            for attribute in attributes]
    grid = torch.stack(rows).permute(2, 0, 1, 3, 4, 5)  # (images, attributes, strengths, 3, R, R)
    directory.mkdir(parents=True, exist_ok=True)
    inference.save_attributes(attributes, directory / "vectors.safetensors", model)
    for number, (title, of_image) in enumerate(zip(titles, grid)):
        for attribute, of_attribute in zip(attributes, of_image):
            for strength, image in zip(strengths, of_attribute):
                name = f"{number:03d}_{safe_stem(title)}_{safe_name(attribute.name)}_{strength:+g}.png"
                inference.save_png(image, directory / name)
    inference.save_png(
        studies.labelled_grid(grid.flatten(0, 1), rows=[attribute.name for attribute in attributes] * len(titles),
                              columns=[f"{strength:+g}" if strength else "0" for strength in strengths]),
        directory / "grid.png")
    click.echo(f"{directory}: {len(titles)} images, {len(attributes)} attributes at {len(strengths)} strengths, "
               f"factor {factor:g}.")


def _known(model: nn.Module, path: Path, names: tuple[str, ...]) -> list[Attribute]:
    from ..errors import DatasetError
    from ..inference import load_attributes

    attributes = load_attributes(path, model)
    known = [attribute.name for attribute in attributes]
    for name in names:
        if name not in known:
            raise DatasetError(f"{path}: no attribute {name!r} in it, but {', '.join(known)}.")
    return [attribute for attribute in attributes if not names or attribute.name in names]


def _of_dataset(
    model: nn.Module, path: Path, names: tuple[str, ...], label: int | None, batch_size: int
) -> list[Attribute]:
    from tqdm import tqdm

    from ..data import ImageDataset
    from ..inference import attributes_of_dataset

    dataset = ImageDataset.open(path)
    with tqdm(total=len(dataset.train), unit=" images", disable=None) as bar:
        return attributes_of_dataset(model, dataset, names, label=label, batch_size=batch_size, progress=bar.update)


def _of_images(
    model: nn.Module, positive: tuple[Path, ...], negative: tuple[Path, ...], names: tuple[str, ...], label: int | None,
    batch_size: int,
) -> Attribute:
    from tqdm import tqdm

    from ..inference import attribute_of_images, open_images

    with ExitStack() as stack:
        sides = [stack.enter_context(open_images(places, model.resolution)) for places in (positive, negative)]
        bar = stack.enter_context(tqdm(total=sum(map(len, sides)), unit=" images", disable=None))
        found = attribute_of_images(model, *sides, name=names[0] if names else positive[0].stem, label=label,
                                    batch_size=batch_size, progress=bar.update)
        for name, reason in [skipped for side in sides for skipped in side.skipped]:
            click.echo(f"skipped {name}: {reason}", err=True)
    return found
