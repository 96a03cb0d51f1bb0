"""Input checks of the reference and of the fake kernels. The compiled kernels make the same ones, in the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hflow_fast.ops.coupling import CouplingSpec

__all__ = [
    "ACTIVATIONS",
    "check_activation",
    "check_bias_act",
    "check_channels",
    "check_coupling",
    "check_floating",
    "check_flow_variable",
    "check_haar",
    "check_haar_options",
    "check_instance_norm",
    "check_like",
    "check_matrices",
    "check_resample",
    "check_stacks",
    "compute_dtype",
]

ACTIVATIONS = ("linear", "leaky_relu", "tanh")
"""Of bias_act, in the order of ``csrc/network_formulas.h``."""

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype flow variables are computed in, and that of log-dets: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_floating(op: str, **tensors: torch.Tensor) -> None:
    """Dense tensors of a floating dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATING:
            raise ValueError(
                f"hflow_fast.{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"hflow_fast.{op}: {name} must be dense (torch.strided), got {tensor.layout}")


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


def check_coupling(op: str, x: torch.Tensor, raw: torch.Tensor, spec: CouplingSpec) -> None:
    """x, and raw with the channels that ``spec`` asks for."""
    check_flow_variable(op, x)
    if spec.spatial and x.dim() not in (3, 4):
        raise ValueError(
            f"hflow_fast.{op}: a spatial active set needs x of shape (B, C, L) or (B, C, H, W), got {tuple(x.shape)}"
        )
    channels = x.shape[1]
    allowed = (spec.raw_channels(channels), spec.raw_channels(spec.active_channels(channels)))
    got = raw.shape[1] if raw.dim() > 1 else 0
    if got not in allowed:
        expected = " or ".join(str(number) for number in dict.fromkeys(allowed))
        raise ValueError(f"hflow_fast.{op}: raw must have {expected} channels, got {tuple(raw.shape)}")
    check_like(op, x, "raw", raw, got)


def check_matrices(op: str, weight: torch.Tensor) -> None:
    """A square matrix or a batch of them, of a floating dtype."""
    check_floating(op, weight=weight)
    if weight.dim() not in (2, 3) or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"hflow_fast.{op}: weight must have shape (C, C) or (N, C, C), got {tuple(weight.shape)}")


def check_stacks(op: str, weights: Sequence[torch.Tensor]) -> None:
    """Any number of such, on one device."""
    for weight in weights:
        check_matrices(op, weight)
        if weight.device != weights[0].device:
            raise ValueError(
                f"hflow_fast.{op}: weights must be on one device, got {weights[0].device} and {weight.device}"
            )


def check_haar_options(order: str, rebalance: float) -> None:
    """The options that a kernel does not see."""
    if order not in ("colour", "wavelet"):
        raise ValueError(f"hflow_fast.haar: order must be 'colour' or 'wavelet', got {order!r}")
    if not 0 < rebalance < math.inf:
        raise ValueError(f"hflow_fast.haar: rebalance must be above 0 and finite, got {rebalance}")


def check_haar(x: torch.Tensor, levels: int, inverse: bool) -> None:
    """x with sizes that the transform divides."""
    check_floating("haar", x=x)
    shape, dimensions = tuple(x.shape), x.dim() - 2
    if dimensions not in (1, 2, 3):
        raise ValueError(f"hflow_fast.haar: x must have shape (B, C, L), (B, C, H, W) or (B, C, D, H, W), got {shape}")
    if not 1 <= levels <= 30 // dimensions:
        raise ValueError(f"hflow_fast.haar: levels must be from 1 to {30 // dimensions}, got {levels}")
    bands, side = 2 ** (levels * dimensions), 2**levels
    if inverse and shape[1] % bands:
        raise ValueError(
            f"hflow_fast.haar: x must have a multiple of {bands} channels for the inverse of {levels} level(s), got {shape}"
        )
    if not inverse and any(size % side for size in shape[2:]):
        raise ValueError(
            f"hflow_fast.haar: the spatial sizes of x must be multiples of {side} for {levels} level(s), got {shape}"
        )


def check_resample(x: torch.Tensor, up: bool, adjoint: bool = False) -> None:
    """x with sizes that can be halved or doubled, and edges to reflect."""
    check_floating("resample", x=x)
    shape, doubles = tuple(x.shape), up != adjoint
    if x.dim() != 4:
        raise ValueError(f"hflow_fast.resample: x must have shape (B, C, H, W), got {shape}")
    least = 2 if not adjoint else 4 if up else 1
    if any(size < least or (not doubles and size % 2) for size in shape[2:]):
        raise ValueError(
            f"hflow_fast.resample: x must have {'' if doubles else 'even '}H and W of at least {least} to be "
            f"{'doubled' if doubles else 'halved'}; pad or crop it, got {shape}"
        )


def check_instance_norm(x: torch.Tensor, epsilon: float) -> None:
    """x with something to normalise over."""
    check_flow_variable("instance_norm", x)
    pixels = math.prod(x.shape[2:])
    if (x.shape[1] if pixels == 1 else pixels) == 1:
        raise ValueError(
            "hflow_fast.instance_norm: x must have more than one pixel, or more than one channel of a single pixel, "
            f"got {tuple(x.shape)}"
        )
    if not epsilon > 0:
        raise ValueError(f"hflow_fast.instance_norm: epsilon must be above 0, got {epsilon:g}")


def check_bias_act(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> None:
    """x, a bias per channel and a residual of x's shape, if there are any."""
    check_flow_variable("bias_act", x)
    if bias is not None:
        check_channels("bias_act", x, (x.shape[1],), bias=bias)
    if residual is not None:
        check_like("bias_act", x, "residual", residual, x.shape[1])


def check_activation(activation: str) -> None:
    """The option of bias_act that a kernel sees as a number."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"hflow_fast.bias_act: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
