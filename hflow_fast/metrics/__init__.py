"""What training and evaluation report: likelihoods in bits per dimension with baselines and their uncertainty, FID."""

from __future__ import annotations

from .baselines import PixelGaussian, uniform_bits_per_dim
from .bits_per_dim import bits_per_dim
from .extractor import FeatureExtractor
from .feature_cache import default_cache
from .fid import Fid, fid_of_images, fid_of_model
from .full_gaussian import FullGaussian
from .likelihood import Bounds, Estimate, evaluation_indices
from .running_mean import RunningMean

__all__ = [
    "Bounds",
    "Estimate",
    "FeatureExtractor",
    "Fid",
    "FullGaussian",
    "PixelGaussian",
    "RunningMean",
    "bits_per_dim",
    "default_cache",
    "evaluation_indices",
    "fid_of_images",
    "fid_of_model",
    "uniform_bits_per_dim",
]
