"""``hflow-fast dataset``: images on disk to a dataset."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..data import ImageDataset

__all__ = ["dataset"]

_SHOWN = 20


def _unwind(number: int, _: object) -> None:
    """A request to end unwinds like Ctrl-C, so that the half-written folder is removed; a second one must not stop that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--resolution", type=click.IntRange(min=1), required=True, help="Side of the images in pixels.")
@click.option("--name", help="Of the dataset inside an HDF5 file of the original, where it holds more than one.")
@click.option("--held-out", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05,
              help="Fraction held out, when the source has no folders that say it.")
@click.option("--seed", type=int, default=0, help="Of the choice of held-out images.")
@click.option("--labels", help="Where the images' labels are from. The word folders: the folder right above an image "
              "is its class. Or a CSV file with a line of titles: name,label gives classes; name and a column for each "
              "attribute, of -1 and 1 or of 0 and 1, gives attributes; CelebA's list_attr_celeba.txt is read, too.")
def dataset(
    source: Path, out: Path, resolution: int, name: str | None, held_out: float, seed: int, labels: str | None
) -> None:
    """Make the dataset OUT from the images of SOURCE: a zip, a folder, or an HDF5 file of the original HFlow.

    Images of any common format become RGB (transparency on white), are cut to the central square and resized.
    With folders train/ and held_out/ (or test/, val/) in SOURCE, these are the split. Files that cannot be read are
    listed and skipped. An existing OUT is never changed.
    """
    from ..data import create_dataset

    signal.signal(signal.SIGTERM, _unwind)
    already_there = os.path.lexists(out)
    made = create_dataset(source, out, resolution, name=name, held_out=held_out, seed=seed, labels=labels,
                          progress=True)
    skipped = made.manifest.skipped
    for item in skipped[:_SHOWN]:
        click.echo(f"skipped {item.name}: {item.reason}", err=True)
    if len(skipped) > _SHOWN:
        click.echo(f"… {len(skipped)} skipped in all, listed in {out / 'dataset.json'}", err=True)
    state = "already there" if already_there else "made"
    click.echo(f"{out}: {state}, {len(made.train)} training and {len(made.held_out)} held-out images of "
               f"{resolution} × {resolution}{_labels(made)}")


def _labels(made: ImageDataset) -> str:
    """What there is to say about labels."""
    counts = {"classes": len(made.classes), "attributes": len(made.attributes)}
    return "".join(f", {count} {what}" for what, count in counts.items() if count)
