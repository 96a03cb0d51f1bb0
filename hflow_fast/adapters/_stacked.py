"""The channel maps of many layers at once: a model of many blocks assembles them in as many calls as one block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..nn._fusion import ChannelMap

__all__ = ["StackedMaps", "fold", "unstack"]


class StackedMaps(NamedTuple):
    """y = W x + b at every pixel, for N layers."""

    weight: Tensor
    """(N, C, C), or (N, C): the diagonals."""
    bias: Tensor | None
    """(N, C); None is zero."""
    log_det: Tensor
    """log|det W| (N,): of one pixel."""


def fold(first: StackedMaps, second: StackedMaps) -> StackedMaps:
    """``second`` after ``first``, layer by layer."""
    dtype = torch.promote_types(first.weight.dtype, second.weight.dtype)
    one, two = first.weight.to(dtype), second.weight.to(dtype)
    bias = second.bias
    if first.bias is not None:
        by = first.bias.to(dtype)
        moved = two * by if two.dim() == 2 else (two @ by.unsqueeze(-1)).squeeze(-1)
        bias = moved if bias is None else moved + bias
    if one.dim() == 2:
        weight = two * (one if two.dim() == 2 else one[:, None])
    else:
        weight = two[:, :, None] * one if two.dim() == 2 else two @ one
    return StackedMaps(weight, bias, first.log_det + second.log_det)


def unstack(maps: StackedMaps, dtype: torch.dtype) -> list[ChannelMap]:
    """One by one, rounded to ``dtype``."""
    weights, log_dets = maps.weight.to(dtype).unbind(), maps.log_det.to(dtype).unbind()
    biases = [None] * len(weights) if maps.bias is None else maps.bias.to(dtype).unbind()
    return [ChannelMap(*parts) for parts in zip(weights, biases, log_dets)]
