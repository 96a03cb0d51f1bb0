"""The unit of likelihoods of images."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

__all__ = ["bits_per_dim"]

Value = TypeVar("Value", float, Tensor)


def bits_per_dim(nats: Value, dims: int, bits: int = 8) -> Value:
    r"""Bits per dimension of discrete images from the density of their dequantised values.

    .. math:: \text{bpd} = -\log_2 p(x) / D + b

    The b bits are the volume of one quantisation bin: x is in [-0.5, 0.5], where a bin is :math:`2^{-b}` wide. In the
    mean over uniform noise this bounds the code length of the discrete images from above (Theis et al., 2016).

    Args:
        nats: −log p(x) in nats, a number or a tensor of any shape.
        dims: D, values per image: 3·R² for RGB.
        bits: b, of the pixel values.

    Returns:
        Same kind and shape as ``nats``.
    """
    return nats / (dims * math.log(2)) + bits
