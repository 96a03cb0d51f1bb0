"""Folding whatever is linear per pixel between two couplings, permutations of channels included."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Callable, Hashable, Iterable, NamedTuple

import torch
from torch import Tensor, nn

from ..nn._fusion import ChannelMap, Evaluated, Opaque, Piece, fold

__all__ = ["Folding", "Part", "Shuffle", "affine_of_inverse", "folding_of", "without_autocast"]

_MIXED_CHANNELS = 32
"""Up to as many channels a map is as good as free behind a coupling (:func:`hflow_fast.ops.flow_step`); with more, one
that is no full matrix costs less on its own."""


class Shuffle(NamedTuple):
    """Channel i of the result is channel ``order[i]``."""

    order: tuple[int, ...]

    @property
    def inverted(self) -> Shuffle:
        """The one that undoes it."""
        return Shuffle(_inverted(self.order))

    @property
    def is_identity(self) -> bool:
        return self.order == tuple(range(len(self.order)))


Part = Piece | Shuffle


class Folding:
    """Makes one map of all neighbouring maps and shuffles, and keeps it while gradients are off.

    Layers hand out the same :class:`ChannelMap` again while gradients are off and their parameters are unchanged
    (:class:`hflow_fast.nn._cache.ParameterCache`), so what a folded map was made of tells whether it is current.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, ...], tuple[list[Part], list[Piece]]] = {}

    def fold(self, name: str, parts: Iterable[Part], x: Tensor) -> list[Piece]:
        """``parts``, in the order of evaluation, as pieces of which no two maps are neighbours.

        Args:
            name: of this chain among those of the layer that owns this object.
            x: the flow variable; its dtype and device decide those of permutation matrices.
        """
        pieces: list[Piece] = []
        maps: list[Part] = []
        for part in parts:
            if isinstance(part, (ChannelMap, Shuffle)):
                maps.append(part)
                continue
            pieces += self._one(name, len(pieces), maps, x)
            pieces.append(part)
            maps = []
        return pieces + self._one(name, len(pieces), maps, x)

    def _one(self, name: str, position: int, maps: list[Part], x: Tensor) -> list[Piece]:
        if not maps:
            return []
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _fold_all(maps, x)
        key = name, position, x.dtype, x.device
        kept = self._kept.get(key)
        if kept is None or len(kept[0]) != len(maps) or any(a is not b for a, b in zip(kept[0], maps)):
            kept = self._kept[key] = maps, _fold_all(maps, x)
        return kept[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Folding:
        return Folding()

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}


def folding_of(layer: nn.Module) -> Folding:
    """The one that ``layer`` keeps."""
    found = vars(layer).get("_fused_folding")
    if found is None:
        found = vars(layer)["_fused_folding"] = Folding()
    return found


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which matrices keep their precision."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def affine_of_inverse(inverse: Tensor, bias: Tensor | None, log_det: Tensor) -> ChannelMap:
    """x = W⁻¹ (y − b) from W⁻¹ in float64; ``log_det`` is log|det W|."""
    return ChannelMap(inverse, None if bias is None else -(inverse @ bias.to(inverse.dtype)), -log_det)


def _fold_all(maps: list[Part], x: Tensor) -> list[Piece]:
    maps = _merge_shuffles(maps)
    if not maps:
        return []
    channels = len(maps[0].order if isinstance(maps[0], Shuffle) else maps[0].weight)
    if channels > _MIXED_CHANNELS and all(isinstance(part, Shuffle) or part.weight.dim() == 1 for part in maps):
        return [Opaque(_gather(part.order) if isinstance(part, Shuffle) else _scale(part)) for part in maps]
    if len(maps) == 1 and isinstance(maps[0], Shuffle):
        matrix = torch.eye(channels, dtype=x.dtype, device=x.device)[index_of(maps[0].order, x.device)]
        return [ChannelMap(matrix, None, matrix.new_zeros(()), _gather(maps[0].order))]
    with without_autocast(x):
        dtype = functools.reduce(torch.promote_types, (part.weight.dtype for part in maps
                                                       if isinstance(part, ChannelMap)))
        folded = maps[0]
        for part in maps[1:]:
            folded = _fold_pair(folded, part, dtype)
        folded = _in(folded, torch.promote_types(x.dtype, torch.float32))
        return [folded._replace(alone=_scale(folded)) if folded.weight.dim() == 1 else folded]


def _fold_pair(first: Part, second: Part, dtype: torch.dtype) -> ChannelMap:
    """``second`` after ``first``, of which one at most is a shuffle."""
    if isinstance(second, Shuffle):
        rows = index_of(second.order, first.weight.device)
        return ChannelMap(_matrix(first.weight)[rows], None if first.bias is None else first.bias[rows], first.log_det)
    if isinstance(first, Shuffle):
        columns = index_of(_inverted(first.order), second.weight.device)
        return ChannelMap(_matrix(second.weight)[:, columns], second.bias, second.log_det)
    return fold(_in(first, dtype), _in(second, dtype))


def _matrix(weight: Tensor) -> Tensor:
    return torch.diag(weight) if weight.dim() == 1 else weight


def _in(part: ChannelMap, dtype: torch.dtype) -> ChannelMap:
    """Matrices are multiplied in one dtype; log-dets stay in theirs."""
    bias = None if part.bias is None else part.bias.to(dtype)
    return ChannelMap(part.weight.to(dtype), bias, part.log_det, part.alone)


def _merge_shuffles(maps: list[Part]) -> list[Part]:
    """Without shuffles side by side, and without those that change nothing."""
    merged: list[Part] = []
    for part in maps:
        if isinstance(part, Shuffle) and merged and isinstance(merged[-1], Shuffle):
            before = merged.pop().order
            part = Shuffle(tuple(before[i] for i in part.order))
        if not (isinstance(part, Shuffle) and part.is_identity):
            merged.append(part)
    return merged


def _gather(order: tuple[int, ...]) -> Callable[[Tensor], Evaluated]:
    def evaluate(x: Tensor) -> Evaluated:
        return x.index_select(1, index_of(order, x.device)), _no_log_det(x)

    return evaluate


def _scale(part: ChannelMap) -> Callable[[Tensor], Evaluated]:
    def evaluate(x: Tensor) -> Evaluated:
        if part.alone is not None:
            return part.alone(x)
        shape = (-1, *(1,) * (x.dim() - 2))
        weight = part.weight.to(x.dtype).view(shape)
        y = x * weight if part.bias is None else torch.addcmul(part.bias.to(x.dtype).view(shape), x, weight)
        return y, _no_log_det(x) + part.log_det * math.prod(x.shape[2:])

    return evaluate


def _no_log_det(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@functools.lru_cache(maxsize=512)
def _kept_index(order: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept beyond the mode it is made in: a tensor of inference mode would not do for training.
    with torch.inference_mode(False):
        return torch.tensor(order, device=device)


def index_of(order: tuple[int, ...], device: torch.device) -> Tensor:
    """``order`` to index with, on ``device``; copied there once."""
    return torch.tensor(order, device=device) if torch.compiler.is_compiling() else _kept_index(order, device)


def _inverted(order: tuple[int, ...]) -> tuple[int, ...]:
    inverse = [0] * len(order)
    for position, channel in enumerate(order):
        inverse[channel] = position
    return tuple(inverse)
