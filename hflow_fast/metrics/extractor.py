"""Feature extractors for the FID: networks that the user gives."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

__all__ = ["FeatureExtractor"]


class FeatureExtractor:
    """A network that maps images (N, 3, H, W), uint8, to features (N, F).

    Resizing and scaling are the network's affair. Where its ``forward`` has an argument ``return_features``, as that of
    StyleGAN's Inception in TorchScript (``inception-2015-12-05.pt``), it is called with True: the 2048 features before
    the classes.

    Args:
        network: the network, on the device where it is to run.
        key: names the network in the cache of features: equal for equal networks. Without one, nothing is cached.
    """

    def __init__(self, network: nn.Module, *, key: str | None = None) -> None:
        self.key = key
        self._network = network.eval()
        self._options = {"return_features": True} if "return_features" in _arguments(network) else {}
        self._device = next((tensor.device for tensor in network.state_dict().values()), torch.device("cpu"))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> FeatureExtractor:
        """Loads a TorchScript file; its key is the SHA-256 of the file.

        **TorchScript is code.** Whoever made the file decides what happens when it is loaded and called: take it from
        a source that you trust.

        Args:
            path: a file written by ``torch.jit.save``.
            device: where the network goes.

        Raises:
            CheckpointError: the file is missing or not TorchScript.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a TorchScript file.") from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
                network = torch.jit.load(io.BytesIO(data), map_location=device)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a TorchScript file; of StyleGAN's Inception take "
                                  "inception-2015-12-05.pt, not the .pkl, which is a pickle.") from error
        extractor = cls(network, key=hashlib.sha256(data).hexdigest())
        extractor._device = torch.device(device)
        return extractor

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features (N, F), float64, of images (N, 3, H, W), uint8, on the network's device.

        Raises:
            CheckpointError: the network does not take such images, or gives something else than finite (N, F).
        """
        try:
            features = self._network(images.to(self._device), **self._options)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise CheckpointError(f"the feature extractor does not take images {tuple(images.shape)}, uint8 "
                                  f"({reason}).") from error
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise CheckpointError(f"the feature extractor has to give (N, F) for N images, it gave {got} for "
                                  f"{len(images)}.")
        features = features.double()
        if not features.isfinite().all():
            raise CheckpointError("the feature extractor gives features that are not finite.")
        return features


def _arguments(network: nn.Module) -> list[str]:
    """Names of the arguments of ``forward``."""
    if isinstance(network, torch.jit.ScriptModule):
        return [argument.name for argument in network.forward.schema.arguments]
    return list(inspect.signature(network.forward).parameters)
