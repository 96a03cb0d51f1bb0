r"""Log-determinants and inverses of many small matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hflow_fast import _extension, reference
from hflow_fast._checks import check_matrices, compute_dtype
from hflow_fast.ops._registration import register_autograd

__all__ = ["lu"]

_KERNEL_SIZE = 64  # larger matrices fill a LAPACK or cuSOLVER call of their own


def lu(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Log\|det\| and inverse of square matrices, from one LU factorisation with partial pivoting each.

    Everything is computed in float64 and rounded once, since float32 inverses of ill-conditioned matrices break
    invertibility. All matrices go through one call. The gradient needs no second factorisation:

    .. math:: \bar W = \bar\ell\, W^{-\top} - W^{-\top}\, \overline{W^{-1}}\, W^{-\top}

    A singular matrix raises nothing, since looking would stall the device: its log\|det\| is −inf and its inverse NaN.
    A matrix with a NaN gives NaN.

    Args:
        weight: (C, C) or (N, C, C), float32, float64, bfloat16 or float16; any strides.

    Returns:
        ``(log_abs_det, inverse)``: () or (N,), in nats, and the shape of ``weight``; float64 for float64 and float32
        for every other dtype.

    Raises:
        ValueError: ``weight`` is not a square matrix or a batch of them, or not of a floating dtype.

    Example:
        >>> lu(torch.tensor([[1.0, 2.0], [-1.0, 2.0]]))
        (tensor(1.3863), tensor([[ 0.5000, -0.5000],
                [ 0.2500,  0.2500]]))
    """
    if weight.dim() < 2 or weight.shape[-1] > _KERNEL_SIZE or not _extension.has_kernel("lu", weight.device):
        return reference.lu(weight)
    return _kernel(weight)


def _fake(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_matrices("lu", weight)
    dtype = compute_dtype(weight)
    return weight.new_empty(weight.shape[:-2], dtype=dtype), weight.new_empty(weight.shape, dtype=dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Callable[..., Any], options: tuple[()], weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_abs_det, inverse = kernel(weight)
        ctx.save_for_backward(inverse)
        ctx.dtype = weight.dtype
        ctx.set_materialize_grads(False)
        return log_abs_det, inverse

    @staticmethod
    def backward(
        ctx: Any, grad_log_abs_det: torch.Tensor | None, grad_inverse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        # Plain torch operations on a differentiable output: second derivatives come for free.
        transposed = ctx.saved_tensors[0].mT
        terms = []
        with torch.autocast(transposed.device.type, enabled=False):
            if grad_log_abs_det is not None:
                terms.append(grad_log_abs_det[..., None, None] * transposed)
            if grad_inverse is not None:
                terms.append(-(transposed @ grad_inverse @ transposed))
        return None, None, sum(terms).to(ctx.dtype) if terms else None


_kernel = None
if _extension.missing_reason() is None:
    torch.library.register_fake("hflow_fast::lu_fwd", _fake)
    _kernel = register_autograd(torch.ops.hflow_fast.lu_fwd.default, _Function, 1)
