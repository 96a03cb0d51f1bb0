r"""Log-determinants and inverses of many small matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hflow_fast import _extension, reference
from hflow_fast._checks import check_matrices, check_stacks, compute_dtype
from hflow_fast.ops._registration import refuse_layouts, refuse_transforms, register_autograd

__all__ = ["lu", "lu_many"]

_KERNEL_SIZE = 64  # larger matrices fill a LAPACK or cuSOLVER call of their own


def lu(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Log\|det\| and inverse of square matrices, from one LU factorisation with partial pivoting each.

    Everything is computed in float64 and rounded once, since float32 inverses of ill-conditioned matrices break
    invertibility. All matrices go through one call. The gradient needs no second factorisation:

    .. math:: \bar W = \bar\ell\, W^{-\top} - W^{-\top}\, \overline{W^{-1}}\, W^{-\top}

    Nothing is raised for a matrix without an inverse, since looking would stall the device. A singular one has
    log\|det\| −inf and an inverse of NaN; so has one that float64 cannot tell from a singular one, where a pivot is below
    2⁻⁴² of its row and column (no matter how those are scaled). A matrix with a NaN or an infinity gives NaN for both.

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


def lu_many(weights: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """:func:`lu` of stacks of different sizes, such as all the small matrices of a model, in one call and one launch.

    Args:
        weights: any number of (C, C) or (N, C, C), as :func:`lu` takes them, on one device.

    Returns:
        ``(log_abs_det, inverse)`` for each, as :func:`lu` returns them.

    Raises:
        ValueError: One of ``weights`` is not what :func:`lu` takes, or they are on different devices.

    Example:
        >>> (first, _), (second, _) = lu_many([torch.eye(2), 2 * torch.ones(3, 1, 1)])
        >>> first, second
        (tensor(0.), tensor([0.6931, 0.6931, 0.6931]))
    """
    if not weights or not _extension.has_kernel("lu_many", weights[0].device):
        return reference.lu_many(weights)
    check_stacks("lu_many", weights)
    if any(weight.shape[-1] > _KERNEL_SIZE for weight in weights):
        return [lu(weight) for weight in weights]
    refuse_transforms("lu_many", weights)
    return list(zip(*torch.ops.hflow_fast.lu_many_fwd.default(weights), strict=True))


def _fake(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_matrices("lu", weight)
    dtype = compute_dtype(weight)
    return weight.new_empty(weight.shape[:-2], dtype=dtype), weight.new_empty(weight.shape, dtype=dtype)


def _gradient(
    inverse: torch.Tensor, grad_log_abs_det: torch.Tensor | None, grad_inverse: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    # Plain torch operations on a differentiable output: second derivatives come for free. The transpose is a view.
    transposed = inverse.mT
    terms = []
    with torch.autocast(transposed.device.type, enabled=False):
        if grad_log_abs_det is not None:
            terms.append(grad_log_abs_det[..., None, None] * transposed)
        if grad_inverse is not None:
            terms.append(-(transposed @ grad_inverse @ transposed))
    return sum(terms).to(dtype) if terms else None


def _setup_context(
    ctx: Any, tensors: tuple[torch.Tensor], options: tuple[()], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = tensors[0].dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_log_abs_det: torch.Tensor | None, grad_inverse: torch.Tensor | None
) -> torch.Tensor | None:
    return _gradient(ctx.saved_tensors[0], grad_log_abs_det, grad_inverse, ctx.dtype)


def _fake_many(weights: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    log_abs_dets, inverses = zip(*map(_fake, weights), strict=True)
    return list(log_abs_dets), list(inverses)


def _setup_context_many(
    ctx: Any, inputs: tuple[list[torch.Tensor]], output: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> None:
    ctx.save_for_backward(*output[1])
    ctx.dtypes = [weight.dtype for weight in inputs[0]]
    ctx.set_materialize_grads(False)


def _backward_many(
    ctx: Any, grad_log_abs_dets: list[torch.Tensor | None], grad_inverses: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    return list(map(_gradient, ctx.saved_tensors, grad_log_abs_dets, grad_inverses, ctx.dtypes))


_kernel = None
if _extension.missing_reason() is None:
    torch.library.register_fake("hflow_fast::lu_fwd", _fake)
    _kernel = register_autograd("lu", _backward, _setup_context)
    torch.library.register_fake("hflow_fast::lu_many_fwd", _fake_many)
    torch.library.register_autograd("hflow_fast::lu_many_fwd", _backward_many, setup_context=_setup_context_many)
    refuse_layouts("lu_many", torch.ops.hflow_fast.lu_many_fwd.default)
