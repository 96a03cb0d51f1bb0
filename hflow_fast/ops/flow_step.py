"""Coupling and channel affine in one pass."""

from __future__ import annotations

import torch

from hflow_fast import reference
from hflow_fast._checks import check_channels, check_coupling, compute_dtype
from hflow_fast._extension import has_kernel
from hflow_fast.ops._registration import empty_like_in, format_of, register
from hflow_fast.ops.conv1x1 import conv1x1
from hflow_fast.ops.coupling import CouplingSpec, coupling, spec_of

__all__ = ["flow_step"]

MAX_FUSED_CHANNELS = 32  # kMaxMixChannels of csrc/common/check.h; beyond, a matrix product is the better kernel


def flow_step(
    x: torch.Tensor,
    raw: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    spec: CouplingSpec = CouplingSpec(),
    *,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Couple x, then mix its channels: all that stands between two coupling networks, in one read and one write.

    .. math:: u, \ell = \mathrm{coupling}(x, \mathrm{raw}), \qquad y = W u + b \quad\text{per pixel}

    W is the 1 × 1 convolution of Glow (Kingma and Dhariwal, 2018, section 3.2) or its inverse, with the next actnorm
    folded into W and b. The fused kernel takes up to 32 channels; more go through :func:`coupling` and
    :func:`conv1x1`.

    Args:
        x: (B, C), (B, C, L) or (B, C, H, W), as :func:`hflow_fast.ops.coupling` takes it.
        raw: The network's output, as :func:`hflow_fast.ops.coupling` takes it.
        weight: (C, C); float32, float64, bfloat16 or float16.
        bias: (C,); any of these dtypes.
        spec: How raw is read.
        inverse: Apply the inverse of the coupling; W and b are applied after it as they are.

    Returns:
        ``(y, log_det)``: y like x, in its memory format; log_det (B,), in nats, of the coupling alone in the evaluated
        direction, float32, or float64 for float64 x. The caller adds H·W·log|det W|, which it knows for many steps.

    Raises:
        ValueError: A shape, dtype or device does not fit; the text names the argument and what it got.

    Example:
        >>> x, raw = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
        >>> y, log_det = flow_step(x, raw, torch.eye(3), torch.zeros(3))
        >>> torch.equal(y, coupling(x, raw)[0])
        True
    """
    if not has_kernel("flow_step", x.device):
        return reference.flow_step(x, raw, weight, bias, spec, inverse=inverse)
    if x.dim() > 1 and x.shape[1] > MAX_FUSED_CHANNELS:
        u, log_det = coupling(x, raw, spec, inverse=inverse)
        return conv1x1(u, weight, bias), log_det
    return _kernel(x, raw, weight, bias, *spec.arguments, inverse)


def _fake(
    x: torch.Tensor, raw: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *options: int | float
) -> tuple[torch.Tensor, torch.Tensor]:
    check_coupling("flow_step", x, raw, spec_of(*options[:-1]))
    check_channels("flow_step", x, (x.shape[1], x.shape[1]), weight=weight)
    check_channels("flow_step", x, (x.shape[1],), bias=bias)
    return empty_like_in(x, format_of(x)), x.new_empty(x.shape[0], dtype=compute_dtype(x))


_kernel = register("flow_step", 4, _fake)
