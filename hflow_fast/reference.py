r"""The meaning of every operation in plain torch: oracle of the tests, and fallback where no kernel is built.

One function per operation, with the name and the arguments of :mod:`hflow_fast.ops`. Computed in float64 for float64
input and in float32 for everything else (also under autocast), rounded once to the dtype of the result;
differentiable by torch's autograd. Read these functions to learn what an operation does; the kernels only do it faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hflow_fast._checks import (
    check_activation,
    check_bias_act,
    check_channels,
    check_coupling,
    check_flow_variable,
    check_haar,
    check_haar_options,
    check_instance_norm,
    check_matrices,
    check_resample,
    check_stacks,
    compute_dtype,
)

if TYPE_CHECKING:
    from hflow_fast.ops.coupling import CouplingSpec

__all__ = [
    "active_mask",
    "actnorm",
    "bias_act",
    "conv1x1",
    "coupling",
    "flow_step",
    "haar",
    "instance_norm",
    "lu",
    "lu_many",
    "resample",
]


def _per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) as (C, 1, ...), to broadcast over x of shape (B, C, ...)."""
    return values.reshape(-1, *(1,) * (x.dim() - 2))


def actnorm(
    x: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hflow_fast.ops.actnorm`."""
    check_flow_variable("actnorm", x)
    check_channels("actnorm", x, (x.shape[1],), log_scale=log_scale, bias=bias)
    dtype = compute_dtype(x)
    s, b = _per_channel(log_scale.to(dtype), x), _per_channel(bias.to(dtype), x)
    y = (x.to(dtype) - b) * torch.exp(-s) if inverse else x.to(dtype) * torch.exp(s) + b
    pixels = x[0, 0].numel() if x.shape[0] and x.shape[1] else 0
    log_det = (-pixels if inverse else pixels) * s.sum()
    return y.to(x.dtype), log_det.expand(x.shape[0])


def _log_scale(s: torch.Tensor, spec: CouplingSpec) -> torch.Tensor:
    """The logarithm of the scale; its maps in the order of ``csrc/formulas.h``."""
    match spec.scale_map:
        case "none":
            return torch.zeros_like(s)
        case "exp":
            return s
        case "exp_clip":
            return s.clamp(-spec.clamp, spec.clamp)
        case "exp_tanh":
            return torch.tanh(s)
        case "sigmoid":
            return F.logsigmoid(s + 2)
        case "sigmoid_inverse":
            return -F.logsigmoid(s + 2)
        case "sigmoid_floor":
            return torch.log(torch.sigmoid(s + 2) + 1e-3)
        case "atan":
            return 0.636 * spec.clamp * torch.atan(s)
        case _:
            return spec.clamp * torch.tanh(s / spec.clamp)


def _scale_and_shift(raw: torch.Tensor, spec: CouplingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's raw scale and shift, (B, C, ...) each; additive couplings have a shift only."""
    if spec.scale_map == "none":
        return torch.zeros_like(raw), raw
    first, second = (raw[:, 0::2], raw[:, 1::2]) if spec.layout == "interleaved" else raw.chunk(2, 1)
    return (second, first) if spec.shift_first else (first, second)


def active_mask(spec: CouplingSpec, shape: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """See :func:`hflow_fast.ops.active_mask`."""
    if not spec.spatial:
        channels = torch.arange(shape[1], device=device)
        return (channels >= shape[1] - spec.active_channels(shape[1])).reshape(-1, *(1,) * (len(shape) - 2))
    width, height = shape[-1], shape[-2] if len(shape) == 4 else 1
    i, j = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)[None]
    index = {
        "checkerboard": i // spec.block + j // spec.block,
        "columns": (j >= width // 2).long().expand(height, width),
        "rows": (i >= height // 2).long().expand(height, width),
    }[spec.active]
    return (index % 2 == spec.parity).reshape(shape[2:])


def coupling(
    x: torch.Tensor, raw: torch.Tensor, spec: CouplingSpec, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hflow_fast.ops.coupling`."""
    check_coupling("coupling", x, raw, spec)
    dtype = compute_dtype(x)
    s, t = _scale_and_shift(raw.to(dtype), spec)
    missing = x.shape[1] - t.shape[1]  # raw may leave out the passive channels, which come first
    pad = (0, 0) * (x.dim() - 2) + (missing, 0)
    active = active_mask(spec, x.shape, x.device)
    s, t = torch.where(active, F.pad(s, pad), 0), torch.where(active, F.pad(t, pad), 0)
    if spec.shift_clamp is not None:
        t = t.clamp(-spec.shift_clamp, spec.shift_clamp)
    z, log_scale = x.to(dtype), _log_scale(s, spec)
    scale = torch.exp(-log_scale if inverse else log_scale)
    match spec.form, inverse:
        case "scale_shift", False:
            y = z * scale + t
        case "scale_shift", True:
            y = (z - t) * scale
        case "add_scale", False:
            y = (z + t) * scale
        case "add_scale", True:
            y = z * scale - t
        case "subtract_scale", False:
            y = (z - t) * scale
        case _:
            y = z * scale + t
    log_det = torch.where(active, -log_scale if inverse else log_scale, 0).flatten(1).sum(1)
    return torch.where(active, y, z).to(x.dtype), log_det


def flow_step(
    x: torch.Tensor,
    raw: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    spec: CouplingSpec,
    *,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hflow_fast.ops.flow_step`."""
    check_coupling("flow_step", x, raw, spec)
    check_channels("flow_step", x, (x.shape[1], x.shape[1]), weight=weight)
    check_channels("flow_step", x, (x.shape[1],), bias=bias)
    u, log_det = coupling(x.to(compute_dtype(x)), raw, spec, inverse=inverse)
    return conv1x1(u, weight, bias).to(x.dtype), log_det


def conv1x1(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`hflow_fast.ops.conv1x1`, which also comes here for many channels: one matrix product, no copies of x."""
    check_flow_variable("conv1x1", x)
    check_channels("conv1x1", x, (x.shape[1], x.shape[1]), weight=weight)
    if bias is not None:
        check_channels("conv1x1", x, (x.shape[1],), bias=bias)
    dtype = compute_dtype(x)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = x.movedim(1, -1)  # (B, ..., C)
    with torch.autocast(x.device.type, enabled=False):
        if x.dim() == 2 or (rows.is_contiguous() and not x.is_contiguous()):
            return F.linear(rows.to(dtype), w, b).movedim(-1, 1).to(x.dtype)
        columns, matrices = x.flatten(2).to(dtype), w.expand(x.shape[0], -1, -1)
        y = matrices @ columns if b is None else torch.baddbmm(b[:, None], matrices, columns)
    return y.reshape(x.shape).to(x.dtype)


SINGULAR_PIVOT = 2.0**-42
"""A pivot this small beside its row and its column is what rounding left of a zero: a thousand float64 roundings."""


def lu(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hflow_fast.ops.lu`."""
    check_matrices("lu", weight)
    matrix = weight.double()
    finite = matrix.isfinite().all(-1).all(-1)
    # LAPACK gives no pivots for a matrix that is not finite, and lu_solve refuses that; its results are NaN below.
    factors, pivots = _lu_factors(torch.where(finite[..., None, None], matrix, 0.0))
    diagonal = factors.diagonal(dim1=-2, dim2=-1).abs()
    identity = torch.eye(weight.shape[-1], dtype=factors.dtype, device=weight.device).expand_as(factors)
    inverse = torch.linalg.lu_solve(factors, pivots, identity)
    # Pivots are judged beside the sums of |W| along their row, and along their column once rows are divided by theirs.
    magnitude = matrix.detach().abs()
    rows = magnitude.sum(-1, keepdim=True)
    columns = (magnitude / rows).sum(-2)
    order = torch.lu_unpack(factors.detach(), pivots, unpack_data=False)[0]
    regular = (diagonal > SINGULAR_PIVOT * (order.mT @ rows).squeeze(-1) * columns).all(-1)
    log_abs_det = torch.where(finite, torch.where(regular, diagonal.log().sum(-1), -math.inf), math.nan)
    inverse = torch.where((finite & regular)[..., None, None], inverse, math.nan)
    dtype = compute_dtype(weight)
    return log_abs_det.to(dtype), inverse.to(dtype)


def _lu_factors(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LU factors and pivots of matrices (…, N, N).

    On a CPU one by one: for a stack of large ones on several threads, torch 2.13's are wrong (pivots of any value).
    """
    if matrices.device.type != "cpu" or matrices.shape[:-2].numel() <= 1:
        return torch.linalg.lu_factor_ex(matrices)[:2]
    pairs = [torch.linalg.lu_factor_ex(matrix)[:2] for matrix in matrices.flatten(0, -3)]
    factors, pivots = (torch.stack(parts) for parts in zip(*pairs))
    return factors.view(matrices.shape), pivots.view(matrices.shape[:-1])


def lu_many(weights: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """See :func:`hflow_fast.ops.lu_many`."""
    check_stacks("lu_many", weights)
    return [lu(weight) for weight in weights]


def haar(
    x: torch.Tensor,
    *,
    levels: int = 1,
    inverse: bool = False,
    order: str = "colour",
    rebalance: float = 1.0,
    mean: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hflow_fast.ops.haar`."""
    check_haar_options(order, rebalance)
    check_haar(x, levels, inverse)
    dimensions = x.dim() - 2
    gains = [rebalance] * 2**dimensions
    if mean:
        gains[0] *= 2 ** (-dimensions / 2)
    log_det = levels * math.prod(x.shape[1:]) * sum(map(math.log, gains)) / len(gains)
    one_level = _haar_pixels if inverse else _haar_bands
    y = x.to(compute_dtype(x))
    for _ in range(levels):
        y = one_level(y, y.new_tensor(gains), order == "colour")
    log_dets = x.new_full(x.shape[:1], -log_det if inverse else log_det, dtype=compute_dtype(x))
    return y.to(x.dtype), log_dets


def _haar_bands(x: torch.Tensor, gains: torch.Tensor, by_colour: bool) -> torch.Tensor:
    """(B, C, H, W) → (B, C·4, H/2, W/2): one level."""
    dimensions = x.dim() - 2
    for bit in range(dimensions):  # after the channels comes one dimension of two bands per axis that is done
        even, odd = x.unflatten(2 + 2 * bit, (-1, 2)).unbind(3 + 2 * bit)
        x = torch.stack([even + odd, even - odd], 2 + bit)
    bands = x.flatten(2, 1 + dimensions) * (gains * 2 ** (-dimensions / 2)).reshape(-1, *(1,) * dimensions)
    return (bands if by_colour else bands.transpose(1, 2)).flatten(1, 2)


def _haar_pixels(y: torch.Tensor, gains: torch.Tensor, by_colour: bool) -> torch.Tensor:
    """The inverse of :func:`_haar_bands`."""
    dimensions = y.dim() - 2
    count = 2**dimensions
    bands = y.unflatten(1, (-1, count)) if by_colour else y.unflatten(1, (count, -1)).transpose(1, 2)
    bands = bands * (2 ** (-dimensions / 2) / gains).reshape(-1, *(1,) * dimensions)
    x = bands.unflatten(2, (2,) * dimensions)
    for bit in reversed(range(dimensions)):
        low, high = x.unbind(2 + bit)
        x = torch.stack([low + high, low - high], 3 + 2 * bit).flatten(2 + 2 * bit, 3 + 2 * bit)
    return x


def resample(x: torch.Tensor, *, up: bool = False) -> torch.Tensor:
    """See :func:`hflow_fast.ops.resample`."""
    check_resample(x, up)
    one_axis = _double_axis if up else _halve_axis
    return one_axis(one_axis(x.to(compute_dtype(x)), 2), 3).to(x.dtype)


def _halve_axis(x: torch.Tensor, axis: int) -> torch.Tensor:
    """(x[2i − 1] + 3 x[2i] + 3 x[2i + 1] + x[2i + 2])/8, edges reflected."""
    n = x.shape[axis]
    padded = torch.cat([x.narrow(axis, 1, 1), x, x.narrow(axis, n - 2, 1)], axis)
    odd, even = padded.unflatten(axis, (-1, 2)).unbind(axis + 1)
    near = even.narrow(axis, 0, n // 2) + odd.narrow(axis, 1, n // 2)
    return (3 * near + odd.narrow(axis, 0, n // 2) + even.narrow(axis, 1, n // 2)) / 8


def _double_axis(x: torch.Tensor, axis: int) -> torch.Tensor:
    """(3 x[i] + x[i − 1])/4 and (3 x[i] + x[i + 1])/4, the first edge repeated, the last reflected."""
    n = x.shape[axis]
    padded = torch.cat([x.narrow(axis, 0, 1), x, x.narrow(axis, n - 2, 1)], axis)
    pair = [3 * x + padded.narrow(axis, 0, n), 3 * x + padded.narrow(axis, 2, n)]
    return torch.stack(pair, axis + 1).flatten(axis, axis + 1) / 4


def instance_norm(x: torch.Tensor, *, epsilon: float = 1e-6) -> torch.Tensor:
    """See :func:`hflow_fast.ops.instance_norm`."""
    check_instance_norm(x, epsilon)
    if x.numel() == 0:
        return x.clone()
    values = x.to(compute_dtype(x))
    axes = [1] if math.prod(x.shape[2:]) == 1 else list(range(2, x.dim()))
    var, mean = torch.var_mean(values, axes, correction=1, keepdim=True)
    return ((values - mean) * torch.rsqrt(var + epsilon)).to(x.dtype)


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "linear",
    slope: float = 0.1,
    gain: float = 1.0,
) -> torch.Tensor:
    """See :func:`hflow_fast.ops.bias_act`."""
    check_bias_act(x, bias, residual)
    check_activation(activation)
    dtype = compute_dtype(x)
    v = x.to(dtype) if bias is None else x.to(dtype) + _per_channel(bias.to(dtype), x)
    match activation:
        case "leaky_relu":
            v = F.leaky_relu(v, slope)
        case "tanh":
            v = torch.tanh(v)
    if residual is not None:
        v = v + residual.to(dtype)
    return (v * gain).to(x.dtype)
