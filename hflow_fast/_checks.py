"""Input checks of the reference and of the fake kernels. The compiled kernels make the same ones, in the same words."""

from __future__ import annotations

import torch

__all__ = ["check_channels", "check_flow_variable", "check_like", "compute_dtype"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype flow variables are computed in, and that of log-dets: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_floating(op: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATING:
            raise ValueError(
                f"hflow_fast.{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
            )


def check_flow_variable(op: str, x: torch.Tensor) -> None:
    """x is (B, C, ...) of a floating dtype."""
    check_floating(op, x=x)
    if x.dim() < 2:
        raise ValueError(f"hflow_fast.{op}: x must have shape (B, C, ...), got {tuple(x.shape)}")


def check_channels(op: str, x: torch.Tensor, shape: tuple[int, ...], **tensors: torch.Tensor) -> None:
    """Parameters of x's channels: the given shape, a floating dtype, x's device."""
    check_floating(op, **tensors)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"hflow_fast.{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"hflow_fast.{op}: {name} must be on the device of x, {x.device}, got {tensor.device}")


def check_like(op: str, x: torch.Tensor, name: str, tensor: torch.Tensor, channels: int) -> None:
    """A tensor of x's shape but for its number of channels, of a floating dtype, on x's device."""
    if tensor.shape != (x.shape[0], channels, *x.shape[2:]):
        raise ValueError(
            f"hflow_fast.{op}: {name} must have the shape of x, {tuple(x.shape)}, with {channels} channels, "
            f"got {tuple(tensor.shape)}"
        )
    check_channels(op, x, tuple(tensor.shape), **{name: tensor})
