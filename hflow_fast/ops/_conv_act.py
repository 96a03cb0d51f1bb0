"""Convolutions on a processor with their activation in the same pass, by oneDNN.

oneDNN applies an activation while a result is still in registers. PyTorch's convolution does not offer that, but the
operator does that its compiler calls for it. Without gradients the weights are, besides, kept in the blocked layout that
oneDNN computes with, which PyTorch makes anew in every call: up to half the time where weights are many and pixels few.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hflow_fast._processor import HAS_BFLOAT16
from hflow_fast.ops._conv3x3 import wants_more_than_a_kernel

__all__ = ["conv_act", "is_fusible", "pays"]

_KERNEL = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_REORDER = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
_SERVES = _KERNEL is not None and _REORDER is not None and HAS_BFLOAT16
_ONES = [1, 1]
_FEWEST_VALUES = 128 * 16 * 16  # of a sample: below, following a gradient through Python costs more than a pass

_kept = WeakTensorKeyDictionary()  # weight → what its blocked form depends on, and that form


def is_fusible(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether :func:`conv_act` can be called: on a processor, for bfloat16 in channels_last, which is always oneDNN's."""
    return (_SERVES and x.device.type == "cpu" and x.dtype == weight.dtype == bias.dtype == torch.bfloat16
            and x.numel() > 0 and torch.backends.mkldnn.enabled and not wants_more_than_a_kernel()
            and x.is_contiguous(memory_format=torch.channels_last))


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether an activation in the same pass is worth it. Whatever the batch, as the result is rounded otherwise."""
    return weight.shape[0] * x.shape[2] * x.shape[3] >= _FEWEST_VALUES


def conv_act(x: Tensor, weight: Tensor, bias: Tensor, padding: int, groups: int, activation: str,
             slope: float) -> Tensor:
    """``activation(conv2d(x, weight, bias))``, rounded once, the same bits with gradients and without.

    Args:
        x: (B, C, H, W), with something in it.
        weight: (K, C / groups, k, k).
        bias: (K,).
        activation: "leaky_relu" of negative ``slope``, "relu", "tanh", or "linear", which is none.

    Returns:
        (B, K, H′, W′).
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        if activation == "linear":
            return F.conv2d(x, weight, bias, padding=padding, groups=groups)
        return _ConvAct.apply(x, weight, bias, padding, groups, activation, slope)
    return _run(x, _blocked(x, weight, padding, groups), bias, padding, groups, activation, slope)


class _ConvAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int, groups: int, activation: str,
                slope: float) -> Tensor:
        y = _run(x, weight, bias, padding, groups, activation, slope)
        ctx.save_for_backward(x, weight, y)
        ctx.options = padding, groups, activation, slope
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        padding, groups, activation, slope = ctx.options
        if activation == "leaky_relu":
            gradient = torch.ops.aten.leaky_relu_backward.default(gradient, y, slope, True)
        elif activation == "relu":
            gradient = torch.ops.aten.threshold_backward.default(gradient, y, 0)
        else:
            gradient = torch.ops.aten.tanh_backward.default(gradient, y)
        gradients = torch.ops.aten.convolution_backward.default(
            gradient, x, weight, [weight.shape[0]], _ONES, [padding] * 2, _ONES, False, [0, 0], groups,
            list(ctx.needs_input_grad[:3]))
        return *gradients, None, None, None, None


def _run(x: Tensor, weight: Tensor, bias: Tensor, padding: int, groups: int, activation: str, slope: float) -> Tensor:
    name = "none" if activation == "linear" else activation
    numbers = [slope] if activation == "leaky_relu" else []
    return _KERNEL.default(x, weight, bias, [padding] * 2, _ONES, _ONES, groups, name, numbers, "")


def _blocked(x: Tensor, weight: Tensor, padding: int, groups: int) -> Tensor:
    """The weight as oneDNN wants it for this input; for the last input's shape it is kept."""
    # One that is trained changes with every step; of one in inference mode no change would be noticed.
    if torch.compiler.is_compiling() or weight.requires_grad or weight.is_inference():
        return weight
    key = weight._version, x.shape, padding, groups
    kept = _kept.get(weight)
    if kept is None or kept[0] != key:
        _kept[weight] = kept = key, _REORDER(weight.detach(), [padding] * 2, _ONES, _ONES, groups, list(x.shape))
    return kept[1]
