r"""The meaning of every operation in plain torch: oracle of the tests, and fallback where no kernel is built.

One function per operation, with the name and the arguments of :mod:`hflow_fast.ops`. Computed in float64 for float64
input and in float32 for everything else (also under autocast), rounded once to the dtype of the result; differentiable by
torch's autograd. Read these functions to learn what an operation does; the kernels only do it faster.
"""

from __future__ import annotations

import torch

from hflow_fast._checks import check_channels, check_flow_variable, compute_dtype

__all__ = ["actnorm"]


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
