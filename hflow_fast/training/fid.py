"""The FID during training, where the configuration names a feature extractor."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from ..data import ImageDataset
from ..errors import ConfigError
from ..metrics import FeatureExtractor, default_cache, fid_of_model
from .config import TrainConfig

__all__ = ["load_extractor", "measure_fid"]


def load_extractor(config: TrainConfig, resolution: int, device: torch.device | str) -> FeatureExtractor | None:
    """INCEPTION_NET_PATH, tried on an image: what is wrong with it is known before training starts. None without one.

    Raises:
        ConfigError: torchmetrics is not installed.
        CheckpointError: the file is not a feature extractor.
    """
    path = config.general.inception_net_path
    if path is None:
        return None
    if find_spec("torchmetrics") is None:
        raise ConfigError("GENERAL.INCEPTION_NET_PATH asks for FIDs, which need torchmetrics: "
                          "pip install 'hflow_fast[fid]', or remove the key.")
    extractor = FeatureExtractor.load(path, device)
    extractor(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8))
    return extractor


def measure_fid(model: nn.Module, dataset: ImageDataset, extractor: FeatureExtractor, config: TrainConfig) -> float:
    """The FID of FID_N_SAMPLES samples at FID_GEN_STD against as many training images, as in the original.

    Raises:
        CheckpointError: the features are not finite.
        DatasetError: fewer than two training images.
        OSError: the features of the dataset cannot be kept in the user's cache.
    """
    output = config.output
    return fid_of_model(model, dataset, extractor, n=output.fid_n_samples, std=output.fid_gen_std,
                        seed=config.general.seed, cache=default_cache()).value
