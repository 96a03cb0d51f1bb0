"""Invertible 1 × 1 convolution: one matrix applied to the channels of every pixel."""

from __future__ import annotations

import math

import torch

from hflow_fast import reference
from hflow_fast._checks import check_channels, check_flow_variable, compute_dtype
from hflow_fast._extension import has_kernel
from hflow_fast.ops._registration import empty_like_in, format_of, register

__all__ = ["conv1x1"]

_KERNEL_CHANNELS = 32
_CHANNELS_LAST_CHANNELS = 12  # on a processor, where that is a matrix product without a transpose
_THIN = 6  # channels per pixel of a sample from which, on a processor, one product for all samples is faster


def conv1x1(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    r"""Mix the channels of every pixel.

    .. math:: y_{o} = \sum_c W_{oc}\, x_{c} + b_o

    The invertible 1 × 1 convolution of Glow (Kingma and Dhariwal, 2018, section 3.2). The inverse is the same function
    with the inverse matrix; the log-determinant, H·W·log\|det W\|, comes from :func:`hflow_fast.ops.lu`. An actnorm
    before or after folds into ``weight`` and ``bias``. Few channels run in a kernel with one read and one write of x,
    many (above 32, or 12 for channels_last on a processor) through a matrix product. Sums are float32, or float64 for
    float64 x.

    Args:
        x: (B, C), (B, C, L) or (B, C, H, W); contiguous and channels_last are read as they are, other strides are made
            contiguous. float32, float64, bfloat16 or float16.
        weight: (C, C), rows are outputs; any of these dtypes.
        bias: (C,) or ``None`` for zero; any of these dtypes.

    Returns:
        y like x, in its memory format.

    Raises:
        ValueError: A shape, dtype or device does not fit; the text names the argument and what it got.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> conv1x1(x, torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([0.5, 0.0]))
        tensor([[2.5000, 3.0000]])
    """
    if not has_kernel("conv1x1", x.device) or x.dim() < 2 or x.shape[1] > _most_channels(x):
        if x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # as the kernel does: flow variables keep their precision
        pixels = math.prod(x.shape[2:])
        if x.device.type == "cpu" and x.is_contiguous() and 1 < pixels <= x.shape[1] // _THIN:
            return _one_product(x, weight, bias)
        return reference.conv1x1(x, weight, bias)
    if bias is None:
        bias = weight.new_zeros(x.shape[1])
    return _kernel(x, weight, bias)


def _one_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The reference, with the pixels of all samples in one matrix: a product per sample would be a thin one, and give
    the weight a gradient per sample. Worth two copies of x."""
    shape, dtype = x.shape, compute_dtype(x)
    check_flow_variable("conv1x1", x)
    check_channels("conv1x1", x, (shape[1], shape[1]), weight=weight)
    columns = x.flatten(2).transpose(0, 1).flatten(1).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if bias is None:
            y = weight.to(dtype) @ columns
        else:
            check_channels("conv1x1", x, (shape[1],), bias=bias)
            y = torch.addmm(bias.to(dtype)[:, None], weight.to(dtype), columns)
    return y.to(x.dtype).unflatten(1, (shape[0], math.prod(shape[2:]))).transpose(0, 1).contiguous().view(shape)


def _most_channels(x: torch.Tensor) -> int:
    if x.device.type == "cpu" and format_of(x) is torch.channels_last:
        return _CHANNELS_LAST_CHANNELS
    return _KERNEL_CHANNELS


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    check_flow_variable("conv1x1", x)
    check_channels("conv1x1", x, (x.shape[1], x.shape[1]), weight=weight)
    check_channels("conv1x1", x, (x.shape[1],), bias=bias)
    return empty_like_in(x, format_of(x))


_kernel = register("conv1x1", 3, _fake)
