"""Half or double resolution through a binomial filter."""

from __future__ import annotations

from typing import Any

import torch

from hflow_fast import _extension, reference
from hflow_fast._checks import check_resample
from hflow_fast.ops._registration import format_of, register_autograd

__all__ = ["resample"]


def resample(x: torch.Tensor, *, up: bool = False) -> torch.Tensor:
    r"""Halve the size by the binomial filter [1, 3, 3, 1]/8 along each axis, or double it by [1, 3, 3, 1]/4.

    Along one axis of n elements:

    .. math::
        \text{down: } & y_i = (x_{2i-1} + 3\,x_{2i} + 3\,x_{2i+1} + x_{2i+2})/8, && x_{-1} = x_1,\ x_n = x_{n-2} \\
        \text{up: } & y_{2i} = (x_{i-1} + 3\,x_i)/4,\quad y_{2i+1} = (3\,x_i + x_{i+1})/4,
            && x_{-1} = x_0,\ x_n = x_{n-2}

    The antialiased resampling of HFlow's networks, whose doubling repeats the first row and column and reflects the
    last; away from the edges it is bilinear interpolation. Linear, so it can be differentiated any number of times;
    the backward pass is its adjoint.

    Args:
        x: (B, C, H, W), with H, W even and at least 2 (down) or at least 2 (up); contiguous and channels_last are read
            as they are, other strides are made contiguous. float32, float64, bfloat16 or float16.
        up: Double the size instead of halving it.

    Returns:
        (B, C, H/2, W/2) or (B, C, 2H, 2W) in the dtype (also under autocast) and the memory format of x, computed in
        float32, or float64 for float64 x.

    Raises:
        ValueError: A shape or dtype does not fit; the text says what x got.

    Example:
        >>> x = torch.tensor([[[[8.0, 0.0], [0.0, 0.0]]]])
        >>> resample(x)
        tensor([[[[2.]]]])
        >>> resample(x, up=True)[0, 0, 0]
        tensor([8., 6., 2., 2.])
    """
    if not _extension.has_kernel("resample", x.device):
        return reference.resample(x, up=up)
    return torch.ops.hflow_fast.resample_fwd.default(x, up, False)


def _fake(x: torch.Tensor, up: bool, adjoint: bool) -> torch.Tensor:
    check_resample(x, up, adjoint)
    height, width = (2 * size if up != adjoint else size // 2 for size in x.shape[2:])
    return torch.empty(
        (*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=format_of(x)
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.up, ctx.adjoint = inputs


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.hflow_fast.resample_fwd.default(grad_y, ctx.up, not ctx.adjoint), None, None


if _extension.missing_reason() is None:
    torch.library.register_fake("hflow_fast::resample_fwd", _fake)
    register_autograd("resample", _backward, _setup_context)
