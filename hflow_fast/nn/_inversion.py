"""Inverses of the matrices that layers apply to channels."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..ops import lu

__all__ = ["invert"]

_ONE_DIGIT = 0.1


def invert(weight: Tensor, layer: str) -> Tensor:
    r"""The inverse of matrices in float64, to be rounded once, when everything else is folded in.

    The round trip x → W x → W⁻¹ W x in floating point of precision ε is off by up to ε·‖\|W⁻¹\|·\|W\|‖ times x, since
    W x is itself rounded: nothing that an inverse does afterwards brings that back. Warns where less than a digit is
    left. Looking stalls the device, so only where gradients are off, when layers keep the result, and not in a CUDA
    graph.

    Args:
        weight: (C, C) or (N, C, C), exactly what the forward direction multiplies by.
        layer: what the warning calls it.
    """
    inverse = lu(weight.double())[1]
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_capturing(weight)):
        condition = (inverse.abs() @ weight.double().abs()).sum(-1).amax(-1).reshape(-1)
        bad = (~(condition * torch.finfo(weight.dtype).eps < _ONE_DIGIT)).nonzero().flatten().tolist()
        if bad:
            which = "its matrix" if weight.dim() == 2 else f"matrix {', '.join(map(str, bad))} of {weight.shape[0]}"
            warnings.warn(
                f"{layer}: {which} is numerically singular (condition number {float(condition[bad[0]]):.2g}, nan where "
                f"there is no inverse): in {str(weight.dtype).removeprefix('torch.')} its inverse does not undo it.",
                RuntimeWarning, stacklevel=2)
    return inverse


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
