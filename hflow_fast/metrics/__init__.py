"""What training and evaluation report: likelihoods in bits per dimension, baselines, means with their uncertainty."""

from __future__ import annotations

from .baselines import PixelGaussian, uniform_bits_per_dim
from .bits_per_dim import bits_per_dim
from .running_mean import RunningMean

__all__ = ["PixelGaussian", "RunningMean", "bits_per_dim", "uniform_bits_per_dim"]
