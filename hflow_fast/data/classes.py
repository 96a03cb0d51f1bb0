"""The classes that a class-conditional model is given with the images, if it is one."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import DatasetError
from .dataset import Images

__all__ = ["HOW_TO_LABEL", "class_labels", "number_of_classes"]

HOW_TO_LABEL = "with hflow-fast dataset … --labels folders, or --labels TABLE.csv of the columns name,label"


def number_of_classes(model: nn.Module) -> int:
    """0 where the model is not class-conditional."""
    return getattr(model, "num_classes", 0)


def class_labels(model: nn.Module, images: Images | Tensor) -> Tensor | None:
    """The labels that a model wants with the images, (N,), int64, on the CPU; None for a model without classes.

    Raises:
        DatasetError: the images have no classes, or have some that the model does not know.
    """
    count = number_of_classes(model)
    if not count:
        return None
    labels = images.labels if isinstance(images, Images) else None
    if labels is None or labels.dim() != 1:
        raise DatasetError(f"the model is conditional on {count} classes, but the images have none; make their dataset "
                           f"{HOW_TO_LABEL}.")
    if len(labels) and int(labels.max()) >= count:
        raise DatasetError(f"the images have a class {int(labels.max())}, but the model's are 0 to {count - 1}; give "
                           "images of the classes that it was trained on.")
    return labels
