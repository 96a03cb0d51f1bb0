"""Bias, activation and residual in one pass."""

from __future__ import annotations

from typing import Literal

import torch

from hflow_fast import reference
from hflow_fast._checks import ACTIVATIONS, check_activation, check_bias_act
from hflow_fast._extension import has_kernel
from hflow_fast.ops._registration import empty_like_in, format_of, register

__all__ = ["bias_act"]


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: Literal["linear", "leaky_relu", "tanh"] = "linear",
    slope: float = 0.1,
    gain: float = 1.0,
) -> torch.Tensor:
    r"""What follows a convolution, in one pass over its output.

    .. math:: y = (a(x + b_c) + r) \cdot g

    with :math:`a(v) = v`, :math:`\max(v, 0) + s \min(v, 0)` or :math:`\tanh v`. With a residual r and the gain
    :math:`g = \sqrt{1/2}`, two tensors of unit variance merge into one of unit variance.

    Args:
        x: (B, C), (B, C, L) or (B, C, H, W); contiguous and channels_last are read as they are, other strides are made
            contiguous. float32, float64, bfloat16 or float16.
        bias: (C,), any of these dtypes.
        residual: Like x, any of these dtypes.
        activation: The function a.
        slope: Of the leaky ReLU below zero.
        gain: The factor g.

    Returns:
        Like x, in its dtype (also under autocast) and memory format, computed in float32, or float64 for float64 x.

    Raises:
        ValueError: A shape, dtype, device or name does not fit; the text names the argument and what it got.

    Example:
        >>> bias_act(torch.tensor([[1.0, -3.0]]), torch.tensor([1.0, 1.0]), activation="leaky_relu")
        tensor([[ 2.0000, -0.2000]])
    """
    if not has_kernel("bias_act", x.device):
        return reference.bias_act(x, bias, residual, activation=activation, slope=slope, gain=gain)
    check_activation(activation)
    if any(t is not None and t.shape == (0,) for t in (bias, residual)):  # which the kernel takes for none
        check_bias_act(x, bias, residual)
    bias, residual = (x.new_empty(0) if t is None else t for t in (bias, residual))
    number = ACTIVATIONS.index(activation)
    return _kernel(x, bias, residual, number, slope, gain)


def _fake(
    x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, activation: int, slope: float, gain: float
) -> torch.Tensor:
    check_bias_act(x, *(None if t.shape == (0,) else t for t in (bias, residual)))
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(
            f"hflow_fast.bias_act: activation must be from 0 to {len(ACTIVATIONS) - 1}, got {activation}"
        )  # fmt: skip
    return empty_like_in(x, format_of(x))


_kernel = register("bias_act", 3, _fake, autocast=False)
