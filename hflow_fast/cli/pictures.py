"""What the commands share that make pictures of a user's images: which images, and where the picture goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import click

from .options import new_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Numbers", "images_of_user", "picture_option", "read_images"]

_IMAGES = 4


class Numbers(click.ParamType):
    """Numbers with commas between them, as a tuple."""

    def __init__(self, kind: type[int] | type[float], at_least: float = 0, at_most: float = float("inf")) -> None:
        self.name = "N,N…"
        self._kind = kind
        self._range = at_least, at_most

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(map(self._kind, value.split(",")))
        except ValueError:
            self.fail(f"{value!r}: give numbers with commas between them.", parameter, context)
        least, most = self._range
        if not all(least <= number <= most and abs(number) < float("inf") for number in numbers):
            limits = [f"at least {least:g}"] * (least > -float("inf")) + [f"at most {most:g}"] * (most < float("inf"))
            self.fail(f"{value!r}: the numbers have to be {' and '.join(limits) or 'finite'}.", parameter, context)
        return numbers


def picture_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--out``, a PNG file that is not there yet."""
    return click.option("--out", required=True, type=click.Path(path_type=Path), callback=_new_png,
                        help="The .png file to make.")(command)


def _new_png(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    if value.suffix.lower() != ".png":
        raise click.BadParameter(f"{value}: the name has to end in .png.")
    return new_file(context, parameter, value)


def images_of_user(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument IMAGES, and ``--pick`` and ``--part``, which say what is taken of it."""
    for decorate in (
        click.option("--pick", type=Numbers(int), help="Which of the images, counted from 0: 3,20.  "
                     f"[default: the first {_IMAGES}]"),
        click.option("--part", type=click.Choice(["all", "train", "held-out"]), default="held-out",
                     help="Which images of a dataset."),
        click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return command


def read_images(
    paths: tuple[Path, ...], resolution: int, part: str, pick: tuple[int, ...] | None
) -> tuple[Tensor, list[str]]:
    """The picked images, (N, 3, R, R), uint8, and their names.

    Raises:
        DatasetError: one of them is missing or not an image.
    """
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
        return torch.cat(images), [found.names[position] for position in pick]
