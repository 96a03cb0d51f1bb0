"""Running a chain of channel maps and couplings in as few passes over the flow variable as possible.

Between two coupling networks every flow of this family is a coupling and then maps that are linear per pixel (actnorms,
1 × 1 convolutions, permutations). Layers, models and adapters describe a direction as :data:`Piece` after
:data:`Piece`, in the order of evaluation; :func:`run` folds neighbouring maps into one matrix and hands each coupling
and the map behind it to :func:`hflow_fast.ops.flow_step`.
"""

from __future__ import annotations

import math
from typing import Callable, Iterable, NamedTuple

import torch
from torch import Tensor

from ..ops import CouplingSpec, conv1x1, coupling, flow_step

__all__ = ["ChannelMap", "Coupling", "Opaque", "Piece", "fold", "run"]

Evaluated = tuple[Tensor, Tensor]
"""A result and its log|det| (B,)."""


class ChannelMap(NamedTuple):
    """y = W x + b at every pixel."""

    weight: Tensor
    """(C, C), or (C,): its diagonal."""
    bias: Tensor | None
    """(C,); None is zero."""
    log_det: Tensor
    """log|det W|, 0-dim: of one pixel."""
    alone: Callable[[Tensor], Evaluated] | None = None
    """A quicker way to evaluate it where it has no neighbour to be folded with."""


class Coupling(NamedTuple):
    """One direction of :func:`hflow_fast.ops.coupling`."""

    raw: Callable[[Tensor], Tensor]
    """The network: flow variable → raw parameters. It must look at passive elements only."""
    spec: CouplingSpec
    inverse: bool = False


class Opaque(NamedTuple):
    """Anything else."""

    function: Callable[[Tensor], Evaluated]


Piece = ChannelMap | Coupling | Opaque


def run(pieces: Iterable[Piece], x: Tensor) -> Evaluated:
    """Evaluates ``pieces`` one after another on ``x`` (B, C, …): the result and log|det| (B,)."""
    terms = []
    first: Coupling | None = None
    then: ChannelMap | None = None
    for piece in pieces:
        if isinstance(piece, ChannelMap):
            then = piece if then is None else fold(then, piece)
            continue
        x = _evaluate(first, then, x, terms)
        first, then = None, None
        if isinstance(piece, Coupling):
            first = piece
        else:
            x, term = piece.function(x)
            terms.append(term)
    x = _evaluate(first, then, x, terms)
    if not terms:
        return x, x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x, terms[0] if len(terms) == 1 else torch.stack(terms).sum(dim=0)


def fold(first: ChannelMap, second: ChannelMap) -> ChannelMap:
    """``second`` after ``first``, as one map."""
    log_det = first.log_det + second.log_det
    bias = second.bias
    if first.bias is not None:
        moved = _times(second.weight, first.bias)
        bias = moved if bias is None else moved + bias
    if second.weight.dim() == 1:
        weight = second.weight * first.weight if first.weight.dim() == 1 else second.weight[:, None] * first.weight
    else:
        weight = second.weight * first.weight if first.weight.dim() == 1 else second.weight @ first.weight
    return ChannelMap(weight, bias, log_det)


def _times(weight: Tensor, vector: Tensor) -> Tensor:
    return weight * vector if weight.dim() == 1 else weight @ vector


def _evaluate(first: Coupling | None, then: ChannelMap | None, x: Tensor, terms: list[Tensor]) -> Tensor:
    """A coupling, the map behind it, or both in one pass; what they add to the log-det goes to ``terms``."""
    if first is None and then is None:
        return x
    if first is None and then.alone is not None:
        x, term = then.alone(x)
        terms.append(term)
        return x
    if then is None:
        x, term = coupling(x, first.raw(x), first.spec, inverse=first.inverse)
        terms.append(term)
        return x
    weight = torch.diag(then.weight) if then.weight.dim() == 1 else then.weight
    bias = weight.new_zeros(len(weight)) if then.bias is None else then.bias
    dtype = torch.promote_types(then.log_det.dtype, torch.float32)
    of_map = then.log_det.to(dtype) * math.prod(x.shape[2:])
    if first is None:
        terms.append(of_map.expand(x.shape[0]))
        return conv1x1(x, weight, bias)
    x, term = flow_step(x, first.raw(x), weight, bias, first.spec, inverse=first.inverse)
    terms.append(term + of_map)
    return x
