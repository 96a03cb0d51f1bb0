"""Whether a configuration, a model, a dataset, a device and so many processes fit together."""

from __future__ import annotations

import torch

from ..data import ImageDataset
from ..data.classes import HOW_TO_LABEL
from ..errors import ConfigError, DatasetError
from .config import GeneralConfig

__all__ = ["check_cuda_graph", "check_dataset", "check_ranks"]


def check_dataset(dataset: ImageDataset, resolution: int, config: GeneralConfig, classes: int = 0) -> None:
    """Whether a model of this resolution, and of so many classes, can be trained on the dataset.

    Raises:
        ConfigError: the configuration's own RESIZE_DATA_TO is not the model's resolution, or the classes are of another
            number.
        DatasetError: it is of another resolution, has too few images for one step, none to evaluate on, or no classes.
    """
    if config.resize_data_to not in (None, resolution):
        raise ConfigError(f"GENERAL.RESIZE_DATA_TO is {config.resize_data_to}, but the model's images are of "
                          f"{resolution} px; make them equal.")
    if dataset.resolution != resolution:
        raise DatasetError(f"{dataset.path}: its images are {dataset.resolution} px, the model's {resolution} px; "
                           f"make a dataset with hflow-fast dataset … --resolution {resolution}.")
    if not len(dataset.held_out):
        raise DatasetError(f"{dataset.path}: no held-out images, so the model could not be judged; "
                           "make the dataset again with --held-out.")
    if len(dataset.train) < config.samples_per_grad_eval:
        raise DatasetError(f"{dataset.path}: {len(dataset.train)} training images are too few for one step; "
                           f"add images or lower SAMPLES_PER_GRAD_EVAL ({config.samples_per_grad_eval}).")
    if classes:
        _check_classes(dataset, classes, config.class_names)


def _check_classes(dataset: ImageDataset, count: int, names: list[str] | None) -> None:
    if not dataset.classes:
        found = "attributes, which are no classes" if dataset.attributes else "no labels"
        raise DatasetError(f"{dataset.path}: its images have {found}, but the model is conditional on {count} classes; "
                           f"make the dataset again {HOW_TO_LABEL}, or set MODEL_PARAMETERS.CONDITIONAL to false.")
    if len(dataset.classes) != count:
        raise ConfigError(f"MODEL_PARAMETERS.NUM_CLASSES is {count}, but {dataset.path} has {len(dataset.classes)} "
                          "classes; make them equal.")
    if names and len(names) != count:
        raise ConfigError(f"GENERAL.CLASS_NAMES are {len(names)} names, but the model has {count} classes; give as "
                          "many, or none.")


def check_cuda_graph(device: torch.device, config: GeneralConfig) -> None:
    """Whether the CUDA graphs that the configuration insists on are possible.

    Raises:
        ConfigError: the device has none.
    """
    if config.cuda_graph == "on" and device.type != "cuda":
        raise ConfigError(f"GENERAL.CUDA_GRAPH is on, but the device is {device}: train on a CUDA device, or set it to "
                          "auto.")


def check_ranks(count: int, config: GeneralConfig) -> None:
    """Whether ``count`` processes can share the passes of a step.

    Raises:
        ConfigError: there are more of them than passes.
    """
    samples, batch = config.samples_per_grad_eval, config.batch_size
    if count <= samples // batch:
        return
    fitting = [size for size in range(1, batch) if samples % size == 0 and samples // size >= count]
    advice = f"lower BATCH_SIZE to {fitting[-1]}, " if fitting else ""
    raise ConfigError(f"{count} processes, but a step has {samples // batch} passes (SAMPLES_PER_GRAD_EVAL {samples} / "
                      f"BATCH_SIZE {batch}): start at most {samples // batch} processes, {advice}or raise "
                      f"SAMPLES_PER_GRAD_EVAL to {count * batch}.")
