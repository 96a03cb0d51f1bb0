"""Haar wavelet transform: pixels into channels, orthonormal."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from hflow_fast import _extension, reference
from hflow_fast._checks import check_haar, check_haar_options, compute_dtype
from hflow_fast.ops._registration import format_of, register_autocast, register_autograd

__all__ = ["haar"]


def haar(
    x: torch.Tensor,
    *,
    levels: int = 1,
    inverse: bool = False,
    order: Literal["colour", "wavelet"] = "colour",
    rebalance: float = 1.0,
    mean: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Turn every 2 × 2 block of pixels (2 in one dimension, 2 × 2 × 2 in three) into its orthonormal Haar bands.

    For the block ``p q / r s`` of a colour, the four bands are::

        0: (p + q + r + s)/2    1: (p - q + r - s)/2    2: (p + q - r - s)/2    3: (p - q - r + s)/2

    and the channels of two colours a, b are, by ``order``::

        "colour":   a0 a1 a2 a3 b0 b1 b2 b3            "wavelet":  a0 b0 a1 b1 a2 b2 a3 b3

    In general a band's number has one bit per axis, set where the difference along that axis is taken, the last axis
    lowest. ``levels=n`` is the transform applied n times, every band split again, in one read and one write. For a
    pyramid, which splits averages only, apply one level to the channels of band 0: ``y[:, ::4]`` by colour,
    ``y[:, :C]`` by wavelet. The orthonormal transform's inverse is its adjoint, so forward and inverse are each
    other's backward.

    Args:
        x: (B, C, L), (B, C, H, W) or (B, C, D, H, W), with spatial sizes that are multiples of 2^levels; to invert,
            channels that are a multiple of 2^(levels·dimensions). Contiguous and (in four dimensions) channels_last are
            read as they are, other strides are made contiguous. float32, float64, bfloat16 or float16.
        levels: How often to apply it, at least 1.
        inverse: Apply the inverse.
        order: Of the output channels (of the input's, to invert).
        rebalance: FrEIA's factor on all bands, per level, above 0.
        mean: Divide band 0 by 2^(dimensions/2), so that it is the mean image in the pixels' own range (Wavelet Flow,
            Yu, Derpanis and Brubaker, 2020).

    Returns:
        ``(y, log_det)``: y (B, C·4^levels, H/2^levels, W/2^levels) in the dtype and memory format of x, or the reverse;
        log_det (B,), in nats, of the evaluated direction: 0, or what ``rebalance`` and ``mean`` make of it; float32, or
        float64 for float64 x.

    Raises:
        ValueError: A size is not divisible, or an argument is out of range; the text names it and what it got.

    Example:
        >>> haar(torch.tensor([[[[4.0, 2.0], [0.0, 2.0]]]]))[0].flatten()
        tensor([4., 0., 2., 2.])
    """
    if not _extension.has_kernel("haar", x.device):
        return reference.haar(x, levels=levels, inverse=inverse, order=order, rebalance=rebalance, mean=mean)
    check_haar_options(order, rebalance)
    bands = 2 ** (x.dim() - 2)
    gain, average_gain = rebalance, bands**-0.5 if mean else 1.0
    if inverse:
        gain, average_gain = 1 / gain, 1 / average_gain
    y = _kernel(x, levels, order == "colour", gain, average_gain, inverse)
    log_det = levels * math.prod(x.shape[1:]) * (math.log(gain) + math.log(average_gain) / bands)
    return y, x.new_full(x.shape[:1], log_det, dtype=compute_dtype(x))


def _fake(
    x: torch.Tensor, levels: int, by_colour: bool, gain: float, average_gain: float, inverse: bool
) -> torch.Tensor:
    check_haar(x, levels, inverse)
    bands, side = 2 ** (levels * (x.dim() - 2)), 2**levels
    channels = x.shape[1] // bands if inverse else x.shape[1] * bands
    spatial = (size * side if inverse else size // side for size in x.shape[2:])
    return torch.empty((x.shape[0], channels, *spatial), dtype=x.dtype, device=x.device, memory_format=format_of(x))


def _setup_context(ctx: Any, tensors: tuple[torch.Tensor], options: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.options = options


def _backward(ctx: Any, grad_y: torch.Tensor) -> torch.Tensor:
    # The adjoint has the same gains; only the exact inverse of an unbalanced transform divides by them.
    *options, inverse = ctx.options
    return _kernel(grad_y, *options, not inverse)


_kernel = None
if _extension.missing_reason() is None:
    torch.library.register_fake("hflow_fast::haar_fwd", _fake)
    _kernel = register_autograd("haar", _backward, _setup_context)
    for key in ("AutocastCPU", "AutocastCUDA"):
        register_autocast(torch.ops.hflow_fast.haar_fwd.default, key)
