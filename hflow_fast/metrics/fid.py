"""The Fréchet distance between the features of a dataset and those of a model's samples."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Iterable, Literal, Sequence

import torch
from torch import Tensor, nn

from ..data import ImageDataset
from ..data.classes import class_labels
from ..errors import ConfigError, DatasetError
from ..inference import draw_samples
from .extractor import FeatureExtractor
from .feature_cache import FeatureCache
from .likelihood import evaluation_indices

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

__all__ = ["Fid", "fid_of_images", "fid_of_model"]

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Fid:
    """A Fréchet distance and what stands behind it."""

    value: float
    real: int
    """Images of the dataset."""
    generated: int
    """Samples of the model."""
    features: int
    """F, features per image."""

    @property
    def caution(self) -> str | None:
        """What to know about the value, if there are too few images for it."""
        fewest = min(self.real, self.generated)
        if fewest > self.features:
            return None
        return (f"{fewest} images have a singular covariance of {self.features} features: compare this FID only with "
                "others of as many images.")


def fid_of_model(
    model: nn.Module, dataset: ImageDataset, extractor: FeatureExtractor, *, n: int, std: float | Sequence[float],
    seed: int = 0, split: Literal["train", "held_out"] = "train", batch_size: int = 16,
    cache: str | os.PathLike[str] | None = None, progress: Progress = lambda count: None,
) -> Fid:
    """The FID of a model's samples against a dataset.

    Fréchet distances fall with the number of images; the same ``n``, extractor and split make them comparable.

    Args:
        model: with ``sample`` and ``resolution``, in evaluation mode.
        dataset: of the model's resolution; its 8-bit images are taken as they are, without flips or noise.
        extractor: of the features. The FID of the literature wants StyleGAN's Inception.
        n: number of samples; of the dataset as many, a fixed random choice, or all if there are fewer. Samples of a
            class-conditional model have the classes of these images, in turn.
        std, seed: of the samples, as :func:`hflow_fast.inference.draw_samples` takes them.
        split: the part of the dataset to compare with.
        batch_size: images per pass of the model and of the extractor.
        cache: folder for the sums over the dataset's features (:func:`hflow_fast.metrics.default_cache`), so that
            they are computed once; used if the extractor has a key. None keeps nothing.
        progress: told the number of images after each batch: of the dataset, unless they were kept, then samples.

    Raises:
        DatasetError: the split is empty, or of another resolution than the model; or the model is class-conditional,
            and the images have no classes or others.
        CheckpointError: the extractor does not take the images.
        ConfigError: fewer than two samples, or torchmetrics is not installed.
    """
    if n < 2:
        raise ConfigError(f"a FID needs at least 2 samples and should have thousands, not {n}; see FID_N_SAMPLES.")
    if dataset.resolution != model.resolution:
        raise DatasetError(f"{dataset.path}: images of {dataset.resolution} × {dataset.resolution}, but the model "
                           f"makes {model.resolution} × {model.resolution}; make a dataset of that resolution.")
    images = dataset.train if split == "train" else dataset.held_out
    indices = evaluation_indices(len(images), n)
    labels = class_labels(model, images)
    kept = FeatureCache(cache) if cache is not None and extractor.key is not None else None
    origin = {"dataset": dataset.fingerprint, "extractor": extractor.key or "", "split": split,
              "images": hashlib.sha256(indices.numpy()).hexdigest()}
    real = kept.read(origin) if kept else None
    if real is None:
        if len(indices) < 2:
            raise DatasetError(f"{dataset.path}: {len(indices)} images in {split}; a FID needs two and should have "
                               "thousands.")
        batches = (images[batch] for batch in indices.split(batch_size))
        real = _sums(batches, extractor, progress)
        if kept:
            kept.write(origin, real)
    samples = (draw_samples(model, batch, std=std, seed=seed, batch_size=batch_size,
                            labels=None if labels is None else labels[indices])
               for batch in (range(n)[start:start + batch_size] for start in range(0, n, batch_size)))
    return _distance(real, _sums(samples, extractor, progress))


def fid_of_images(real: Tensor, generated: Tensor, extractor: FeatureExtractor, *, batch_size: int = 16) -> Fid:
    """The Fréchet distance between two sets of images (N, 3, H, W), uint8, of at least two each."""
    return _distance(*(_sums(images.split(batch_size), extractor, lambda count: None) for images in (real, generated)))


class _Features(nn.Module):
    """Stands for the extractor in torchmetrics, which is given features instead of images."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(features: int) -> FrechetInceptionDistance:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ConfigError("the FID needs the package torchmetrics: pip install 'hflow_fast[fid]'.") from error
    metric = FrechetInceptionDistance(feature=_Features(features))
    metric.persistent(True)
    return metric


def _sums(batches: Iterable[Tensor], extractor: FeatureExtractor, progress: Progress) -> dict[str, Tensor]:
    """What torchmetrics accumulates over the features of real images: their number, sum, and sum of outer products."""
    metric = None
    for batch in batches:
        features = extractor(batch).cpu()
        if metric is None:
            metric = _metric(features.shape[1])
        metric.update(features, real=True)
        progress(len(batch))
    return {name: value for name, value in metric.state_dict().items() if name.startswith("real_")}


def _distance(real: dict[str, Tensor], generated: dict[str, Tensor]) -> Fid:
    count = len(real["real_features_sum"])
    metric = _metric(count)
    metric.load_state_dict(real | {name.replace("real_", "fake_", 1): value for name, value in generated.items()})
    # compute() would warn that nothing was given to update().
    metric.update(torch.empty(0, count, dtype=torch.float64), real=False)
    return Fid(float(metric.compute()), int(metric.real_features_num_samples), int(metric.fake_features_num_samples),
               count)


