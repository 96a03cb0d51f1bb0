"""Evaluating flows of normflows one after another in as few passes as possible.

A direction is named as in normflows: *sampling* is latent to data, ``forward``; the other is its ``inverse``.
"""

from __future__ import annotations

from functools import partial
from typing import Iterable, Iterator

from torch import Tensor, nn

from ..._checks import compute_dtype
from ...nn._fusion import Opaque
from .. import _chain
from .._chain import Part

__all__ = ["Fused", "call", "evaluate", "parts_of"]


class Fused:
    """Mixed into the fast class of a layer that can say what it consists of.

    In front of the stock class, whose methods serve what the kernels do not.
    """

    def parts(self, x: Tensor, sampling: bool) -> Iterable[Part] | None:
        """What a direction consists of, in order of evaluation, for flow variables like ``x``. None: not fusible."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,)."""
        return self._evaluate(z, True) if self.parts(z, True) is not None else super().forward(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,)."""
        return self._evaluate(z, False) if self.parts(z, False) is not None else super().inverse(z)

    def alone(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """One pass of a layer that is a map, without a matrix."""
        return call(self, inverse, x)

    def _evaluate(self, z: Tensor, sampling: bool) -> tuple[Tensor, Tensor]:
        y, log_det = evaluate([self], z, sampling)
        return y, log_det.to(z.dtype)


def evaluate(layers: Iterable[nn.Module], x: Tensor, sampling: bool) -> tuple[Tensor, Tensor]:
    """Runs ``layers`` in this order on ``x`` (B, C, …): the result and log|det| (B,)."""
    return _chain.evaluate(parts_of(layers, x, sampling), x)


def parts_of(layers: Iterable[nn.Module], x: Tensor, sampling: bool) -> Iterator[Part]:
    """What ``layers``, fast ones and others, consist of."""
    for layer in layers:
        inner = layer.parts(x, sampling) if isinstance(layer, Fused) else None
        if inner is None:
            yield Opaque(partial(call, layer, sampling))
        else:
            yield from inner


def call(layer: nn.Module, sampling: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    """One layer by itself. Log-dets of normflows are numbers, tensors without dimensions, or (B,)."""
    y, log_det = layer(x) if sampling else layer.inverse(x)
    dtype = compute_dtype(y)
    if isinstance(log_det, Tensor):
        return y, log_det.to(y.device, dtype).expand(len(y))
    return y, y.new_full((len(y),), log_det, dtype=dtype)
