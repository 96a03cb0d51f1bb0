"""Attributes of images as directions in latent space, found from labelled images and added to the latents of others.

Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1×1 Convolutions", 2018, section 6.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..data import ImageDataset, from_uint8, to_uint8
from ..data.classes import HOW_TO_LABEL
from ..errors import ConfigError, DatasetError
from .graphs import replayed, replayed_decoder
from .inputs import ImageSet
from .interpolation import latents_of
from .labels import Labels, label_tensors

__all__ = ["FACTOR", "Attribute", "AttributeMeans", "attribute_of_images", "attributes_of_dataset", "manipulate"]

FACTOR = 1.6
"""How far strength 1 goes along an attribute's direction: the factor of Glow's own demo."""

_FEWEST = 2


@dataclass(frozen=True)
class Attribute:
    """What is common to some images, as a direction in latent space."""

    name: str
    direction: list[Tensor]
    """Mean latents of the images that have it minus those of the images that do not: (C, H, W), float32, on the CPU,
    for each of the model's ``latent_shapes``."""
    positives: int
    """Images that have it."""
    negatives: int
    """Images that do not."""


class AttributeMeans:
    r"""Mean latents of the images with and without each of several attributes, over any number of images.

    .. math:: v_a = \frac{1}{|P_a|} \sum_{x \in P_a} z(x) - \frac{1}{|N_a|} \sum_{x \in N_a} z(x)

    Images are encoded once for all attributes and forgotten; sums are kept in float64 on the model's device, A + 1
    times an image's values for A attributes.

    Args:
        model: a flow, such as an HFlow or a Glow.
        names: of the attributes.

    Raises:
        ConfigError: no names, or one twice.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"attributes {list(names)}: give at least one, each once.")
        self.names = list(names)
        device = next(model.parameters()).device
        dims = [torch.Size(shape).numel() for shape in model.latent_shapes]
        self._model = model
        self._encode = replayed(model, model.encode)
        self._count = 0
        self._positives = torch.zeros(len(names), dtype=torch.int64)
        self._sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in dims]
        self._sums_with = [torch.zeros(len(names), size, dtype=torch.float64, device=device) for size in dims]

    @torch.no_grad()
    def update(self, images: Tensor, has: Tensor, labels: Labels = None) -> None:
        """Adds a batch.

        Args:
            images: (N, 3, R, R), uint8.
            has: (N, A), which image has which attribute; those that do not have it count as examples against it.
            labels: for a class-conditional model: one class for all images, or one for each.

        Raises:
            ValueError: shapes differ.
        """
        if has.shape != (len(images), len(self.names)):
            raise ValueError(f"AttributeMeans: has is of shape {tuple(has.shape)}; {len(images)} images and "
                             f"{len(self.names)} attributes want {(len(images), len(self.names))}.")
        device = self._sums[0].device
        x = from_uint8(images).to(next(self._model.parameters()))
        latents, _ = self._encode(x, *label_tensors(self._model, labels, len(x)))
        members = has.to(device, torch.float64).t()
        for latent, total, with_attribute in zip(latents, self._sums, self._sums_with):
            values = latent.flatten(1).double()
            total += values.sum(dim=0)
            with_attribute += members @ values
        self._count += len(images)
        self._positives += has.sum(dim=0).cpu()

    def attributes(self) -> list[Attribute]:
        """The attributes, in the order of their names.

        Raises:
            DatasetError: fewer than two images have one of them, or do not.
            ArithmeticError: latents are not finite.
        """
        shapes, found = self._model.latent_shapes, []
        for index, (name, positives) in enumerate(zip(self.names, self._positives.tolist())):
            negatives = self._count - positives
            if min(positives, negatives) < _FEWEST:
                raise DatasetError(f"attribute {name!r}: {positives} images have it and {negatives} do not; give at "
                                   f"least {_FEWEST} of each, better hundreds.")
            direction = [(with_attribute[index] / positives - (total - with_attribute[index]) / negatives).view(shape)
                         for total, with_attribute, shape in zip(self._sums, self._sums_with, shapes)]
            if not all(part.isfinite().all() for part in direction):
                raise ArithmeticError(f"attribute {name!r}: the latents of some images are not finite.")
            found.append(Attribute(name, [part.float().cpu() for part in direction], positives, negatives))
        return found


def attribute_of_images(
    model: nn.Module, positive: ImageSet, negative: ImageSet, *, name: str = "attribute", label: int | None = None,
    batch_size: int = 16, progress: Callable[[int], object] = lambda count: None,
) -> Attribute:
    """The attribute that some images have and others do not.

    Args:
        model: a flow, such as an HFlow or a Glow.
        positive, negative: images with it and without it, of :func:`~hflow_fast.inference.open_images`.
        name: of the attribute.
        label: for a class-conditional model: the class under which all are encoded.
        batch_size: images at a time.
        progress: told the number of images after each batch.

    Raises:
        DatasetError: fewer than two images on one side.
    """
    means = AttributeMeans(model, [name])
    for images, has in ((positive, True), (negative, False)):
        for _, batch in images.batches(range(len(images)), batch_size):
            means.update(batch, torch.full((len(batch), 1), has), label)
            progress(len(batch))
    return means.attributes()[0]


def attributes_of_dataset(
    model: nn.Module, dataset: ImageDataset, names: Iterable[str], *, label: int | None = None, batch_size: int = 16,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Attribute]:
    """Attributes that a dataset's labels say: training images with each against those without.

    Where the labels are classes, a class is an attribute: its images against those of all others.

    Args:
        model: a flow, such as an HFlow or a Glow, of the dataset's resolution.
        dataset: with attributes or classes.
        names: of those that are wanted.
        label: for a class-conditional model: the class under which all are encoded.
        batch_size: images at a time.
        progress: told the number of images after each batch.

    Raises:
        DatasetError: the dataset has no labels, or none of a name, or is of another resolution; or fewer than two
            images have one of them, or do not.
    """
    names = list(names)
    if dataset.resolution != model.resolution:
        raise DatasetError(f"{dataset.path}: its images have {dataset.resolution} px, the model's {model.resolution} "
                           f"px; make a dataset with --resolution {model.resolution}.")
    known, labels = dataset.attributes or dataset.classes, dataset.train.labels
    if labels is None:
        raise DatasetError(f"{dataset.path}: its images have no labels; make it {HOW_TO_LABEL}; or give images with and "
                           "without the attribute.")
    for name in names:
        if name not in known:
            raise DatasetError(f"{dataset.path}: no images of {name!r} in it; there are {', '.join(known)}.")
    columns = torch.tensor([known.index(name) for name in names])
    means = AttributeMeans(model, names)
    for batch in torch.arange(len(dataset.train)).split(batch_size):
        own = labels[batch]
        has = own[:, columns] if dataset.attributes else own[:, None] == columns
        means.update(dataset.train[batch], has, label)
        progress(len(batch))
    return means.attributes()


@torch.no_grad()
def manipulate(
    model: nn.Module, images: Tensor, attribute: Attribute, strengths: Sequence[float], *, factor: float = FACTOR,
    label: int | None = None, batch_size: int = 16,
) -> Tensor:
    """Images with an attribute added to them, or taken away: decoded from z + strength · factor · direction.

    Args:
        model: whose latents the attribute was found in.
        images: (N, 3, R, R), uint8.
        attribute: what to add.
        strengths: S numbers; 0 gives the images themselves, below 0 takes the attribute away.
        factor: how far strength 1 goes.
        label: for a class-conditional model: the class under which all are encoded and decoded.
        batch_size: images at a time.

    Returns:
        (S, N, 3, R, R), uint8, on the CPU. Where latents are so far from those of images that what they decode to is
        not finite, pixels are black, and a warning says how many images have some.

    Raises:
        DatasetError: the attribute was found in latents of other shapes.
    """
    shapes = [tuple(part.shape) for part in attribute.direction]
    if shapes != list(map(tuple, model.latent_shapes)):
        raise DatasetError(f"attribute {attribute.name!r}: of latents of shapes {shapes}, this model's are "
                           f"{list(model.latent_shapes)}; find it with this model.")
    decode = replayed_decoder(model)
    broken = 0
    changed = torch.empty(len(strengths), *images.shape, dtype=torch.uint8)
    for positions in torch.arange(len(images)).split(batch_size):
        latents = latents_of(model, images[positions], label)
        classes = label_tensors(model, label, len(positions))
        for row, strength in enumerate(strengths):
            moved = [z + strength * factor * part.to(z) for z, part in zip(latents, attribute.direction)]
            decoded = decode(*moved, *classes)
            changed[row, positions] = to_uint8(decoded).cpu()
            broken += int((~decoded.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        warnings.warn(f"attribute {attribute.name!r}: {broken} of {changed[:, :, 0, 0, 0].numel()} images have pixels "
                      "that are not finite, shown black; take strengths nearer to 0.", RuntimeWarning, stacklevel=2)
    return changed
