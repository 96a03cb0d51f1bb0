"""Between 8-bit pixels and the continuous values that a flow models."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantize", "from_uint8", "to_uint8"]

_FRACTION_BITS = 16


def dequantize(
    images: Tensor,
    *,
    bits: int = 8,
    noise_std: float = 0.0,
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Uniform dequantisation to [-0.5, 0.5), as HFlow's and Glow's.

    .. math:: x = \lfloor v / 2^{8-b} \rfloor / 2^b + u - 1/2 + \sigma n,\quad
              u \sim \mathcal U[0, 2^{-b}),\ n \sim \mathcal N(0, 1)

    u is drawn in steps of :math:`2^{-16-b}`, so that x is exact in float32 and, without Gaussian noise,
    :func:`to_uint8` gives the 8-bit images back bit for bit.

    Source: Theis et al., "A note on the evaluation of generative models", 2016 (uniform dequantisation).

    Args:
        images: (…, H, W), uint8, on any device.
        bits: b, 1 to 8: the low 8 − b bits of each value are dropped.
        noise_std: σ ≥ 0, in the units of the result.
        flip: mirror each image left to right with probability 1/2; images are then (B, C, H, W).
        generator: on the device of the images; PyTorch's default one when None.

    Returns:
        Same shape and device, float32.

    Raises:
        ValueError: not uint8, or a parameter outside its range.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"dequantize: images must be uint8, got {images.dtype}.")
    _check_bits("dequantize", bits)
    if not noise_std >= 0:
        raise ValueError(f"dequantize: noise_std must be at least 0, got {noise_std}.")
    if flip:
        if images.dim() != 4:
            raise ValueError(f"dequantize: flip needs images (B, C, H, W), got {tuple(images.shape)}.")
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    quantized = (images >> (8 - bits)).int() << _FRACTION_BITS
    fraction = torch.randint(
        2**_FRACTION_BITS, images.shape, dtype=torch.int32, device=images.device, generator=generator
    )
    x = (quantized + fraction) * 2.0 ** -(bits + _FRACTION_BITS) - 0.5
    if noise_std > 0:
        x += noise_std * torch.randn(x.shape, device=x.device, generator=generator)
    return x


def to_uint8(x: Tensor, bits: int = 8) -> Tensor:
    """8-bit pixels of continuous values: ⌊2ᵇ·(x + ½)⌋·2⁸⁻ᵇ, limited to the 2ᵇ values that there are; NaN becomes 0.

    Args:
        x: any shape, floating point; [-0.5, 0.5] is black to white.
        bits: b, 1 to 8: the low 8 − b bits of the result are 0, as they are to a model of b bits.

    Returns:
        Same shape and device, uint8.
    """
    _check_bits("to_uint8", bits)
    values = torch.nan_to_num(x.float() * 2**bits + 2 ** (bits - 1), nan=0.0).floor_().clamp_(0, 2**bits - 1)
    return values.to(torch.uint8) << (8 - bits)


def from_uint8(images: Tensor, bits: int = 8) -> Tensor:
    """Continuous values in the middle of what each b-bit value stands for: (⌊v / 2⁸⁻ᵇ⌋ + ½)/2ᵇ − ½.

    No noise: the same images always give the same values, as far as can be from those of another image.

    Args:
        images: any shape, uint8.
        bits: b, 1 to 8: the low 8 − b bits of each value are dropped.

    Returns:
        Same shape and device, float32; :func:`to_uint8` gives the images back, without the dropped bits.
    """
    _check_bits("from_uint8", bits)
    return ((images >> (8 - bits)).float() + 0.5) / 2**bits - 0.5


def _check_bits(function: str, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"{function}: bits must be 1 to 8, got {bits}.")
