"""Transforms of nflows one after another."""

from __future__ import annotations

import functools
import operator
from typing import Iterator

from nflows import transforms
from nflows.transforms.base import Transform
from torch import Tensor

from ...nn._fusion import Evaluated
from ...nn._hooks import is_watched
from .._chain import evaluate, zeros
from .layers import Fused

__all__ = ["CompositeTransform", "steps_of"]


class CompositeTransform(transforms.CompositeTransform):
    """Transforms one after another, neighbours fused; transforms without a fast class are called as they are."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Evaluated:
        return self._evaluate(False, inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Evaluated:
        return self._evaluate(True, inputs, context)

    def _evaluate(self, inverse: bool, inputs: Tensor, context: Tensor | None) -> Evaluated:
        steps = list(steps_of(self, inverse))
        x, terms = inputs, []
        while steps:
            fused = _fusable(x, steps)
            if fused:
                parts = [part for step, backward in fused for part in step.parts(backward, context)]
                x, term = evaluate(parts, x)
                steps = steps[len(fused):]
            else:
                (step, backward), *steps = steps
                x, term = step.inverse(x, context) if backward else step(x, context)
            terms.append(term)
        return x, functools.reduce(operator.add, terms) if terms else zeros(inputs)


Step = tuple[Transform, bool]
"""A transform, and whether its inverse is meant."""

_TRANSPARENT = (transforms.CompositeTransform, transforms.InverseTransform)


def steps_of(transform: Transform, inverse: bool) -> Iterator[Step]:
    """What a composite evaluates, in order; it looks into those that only pass on what they get."""
    if isinstance(transform, transforms.InverseTransform):
        children, inverse = [transform._transform], not inverse
    else:
        children = list(transform._transforms)[::-1 if inverse else 1]
    for child in children:
        transparent = isinstance(child, CompositeTransform) or type(child) in _TRANSPARENT
        if transparent and not _is_watched(child, inverse):
            yield from steps_of(child, inverse)
        else:
            yield child, inverse


def _fusable(x: Tensor, steps: list[Step]) -> list[Step]:
    """The first of ``steps``, as many as parts can describe."""
    fused: list[Step] = []
    channels = x.shape[1] if x.dim() > 1 else 0
    for step, inverse in steps:
        if (not isinstance(step, Fused) or _is_watched(step, inverse)
                or not step.fuses(x.dim(), channels, x.dtype, inverse)):
            break
        fused.append((step, inverse))
        channels = step.channels_after(channels, inverse)
    return fused


def _is_watched(transform: Transform, inverse: bool) -> bool:
    """Whether it has hooks; ``inverse``, a method like any other, calls none."""
    return not inverse and is_watched(transform)
