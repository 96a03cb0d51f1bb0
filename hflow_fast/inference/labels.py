"""Classes of class-conditional models: what is given to ``encode`` and ``decode`` beside images and latents."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from ..data.classes import number_of_classes
from ..errors import ConfigError

__all__ = ["Labels", "class_number", "in_turn", "label_tensors", "listed"]

Labels = int | Sequence[int] | Tensor | None
"""One class for all images, or one for each; None for models without classes."""

_SHOWN = 20


def label_tensors(model: nn.Module, labels: Labels, count: int) -> tuple[Tensor, ...]:
    """What follows the images, or the latents, in a call of ``model.encode`` or ``model.decode``.

    Args:
        model: class-conditional if it has ``num_classes`` above 0.
        labels: one class for all, or one for each of the images.
        count: N, number of images.

    Returns:
        The labels (N,), int64, on the model's device; nothing for a model without classes.

    Raises:
        ConfigError: the model has classes and there are no labels, or the converse; or a label is none of its classes.
    """
    classes = number_of_classes(model)
    if not classes:
        if labels is not None:
            raise ConfigError(f"{type(model).__name__}: this model has no classes; leave labels out.")
        return ()
    if labels is None:
        raise ConfigError(f"{type(model).__name__}: this model is class-conditional; say which class with labels; "
                          f"{listed(classes)}.")
    numbers = torch.as_tensor(labels, dtype=torch.int64)
    if numbers.dim() > 1 or (numbers.dim() == 1 and len(numbers) != count):
        raise ConfigError(f"labels of shape {tuple(numbers.shape)} for {count} images; give one, or one for each.")
    # A tensor on a GPU would have to be waited for.
    if numbers.device.type == "cpu" and not ((0 <= numbers) & (numbers < classes)).all():
        raise ConfigError(f"labels {numbers.unique().tolist()[:_SHOWN]}: this model's classes are 0 to {classes - 1}.")
    return (numbers.to(next(model.parameters()).device).expand(count),)


def in_turn(labels: Labels, indices: Sequence[int]) -> Labels:
    """The labels of samples by their numbers: sample i has the class ``labels[i mod len(labels)]``."""
    if labels is None or isinstance(labels, int):
        return labels
    if not len(labels):
        raise ConfigError("there is no class in labels; give at least one.")
    return [int(labels[index % len(labels)]) for index in indices]


def class_number(word: str, classes: int, names: Sequence[str] = ()) -> int:
    """The class that a user means.

    Args:
        word: its name, or its number from 0 where no class has that name.
        classes: how many there are.
        names: of the classes, as far as they have any.

    Raises:
        ConfigError: there is no such class; the text lists them.
    """
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < classes:
        return int(word)
    raise ConfigError(f"{word!r} is not a class of this model; {listed(classes, names)}.")


def listed(classes: int, names: Sequence[str] = ()) -> str:
    """A model's classes, for messages."""
    if not names:
        return f"its classes are 0 to {classes - 1}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"its classes are {', '.join(names[:_SHOWN])}{more}"
