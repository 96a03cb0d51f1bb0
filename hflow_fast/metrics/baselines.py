"""Models that need no training, to compare held-out bits per dimension with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor

from ..data import Images
from .bits_per_dim import bits_per_dim

__all__ = ["PixelGaussian", "uniform_bits_per_dim"]

_CHUNK = 256


def uniform_bits_per_dim(bits: int = 8) -> float:
    """Bits per dimension of the uniform density on [-0.5, 0.5], for any image: the number of bits."""
    return bits_per_dim(0.0, 1, bits)


@dataclass(frozen=True)
class PixelGaussian:
    """Independent Gaussians, one for every pixel and channel, of images dequantised to [-0.5, 0.5]."""

    mean: Tensor
    """(3, R, R), float64."""
    variance: Tensor
    """(3, R, R), float64."""
    bits: int

    @classmethod
    def fit(cls, images: Images | Tensor, bits: int = 8) -> PixelGaussian:
        """Maximum likelihood over images and dequantisation noise, which adds 1/12 of a squared bin to each variance.

        Args:
            images: (N, C, H, W), uint8, N ≥ 1.
            bits: of the pixel values, 1 to 8: the low 8 − bits are dropped.
        """
        total = squares = torch.zeros((), dtype=torch.int64)
        for chunk in _chunks(images, bits):
            total = total + chunk.sum(0)
            squares = squares + (chunk * chunk).sum(0)
        # Integer sums keep the difference of large numbers exact.
        count = len(images)
        spread = (count * squares - total * total).double() / count**2
        return cls(mean=_centre(total.double() / count, bits), variance=(spread + 1 / 12) / 4**bits, bits=bits)

    def bits_per_dim(self, images: Images | Tensor) -> Tensor:
        """Bits per dimension of each image, in the exact mean over its dequantisation noise.

        Args:
            images: (N, C, H, W), uint8.

        Returns:
            (N,), float64.
        """
        noise = 1 / (12 * 4**self.bits)
        nats = []
        for chunk in _chunks(images, self.bits):
            distance = (_centre(chunk.double(), self.bits) - self.mean).square() + noise
            nats.append(0.5 * (distance / self.variance + (2 * math.pi * self.variance).log()).sum((1, 2, 3)))
        return bits_per_dim(torch.cat(nats), self.mean.numel(), self.bits)


def _chunks(images: Images | Tensor, bits: int) -> Iterator[Tensor]:
    """A few images at a time, quantised, int64."""
    for start in range(0, len(images), _CHUNK):
        yield (images[start : start + _CHUNK] >> (8 - bits)).long()


def _centre(quantized: Tensor, bits: int) -> Tensor:
    """The middle of the quantisation bin, in [-0.5, 0.5]."""
    return (quantized + 0.5) / 2**bits - 0.5
