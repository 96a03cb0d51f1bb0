"""Linear maps of the channels of every pixel: folding neighbours into one, and inverting them, many in one go."""

from __future__ import annotations

from functools import reduce
from itertools import groupby
from typing import Any, Callable, Hashable, Iterable, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from ..ops import lu
from ._inversion import invert

__all__ = ["ChannelMap", "Evaluated", "LazyMap", "Map", "fold", "fold_all", "invert_all", "is_diagonal", "stack"]

Evaluated = tuple[Tensor, Tensor]
"""A result and its log|det| (B,)."""


class ChannelMap(NamedTuple):
    """y = W x + b at every pixel. A stack of N maps has one more dimension in front everywhere."""

    weight: Tensor
    """(C, C), or (C,): its diagonal."""
    bias: Tensor | None
    """(C,); None is zero."""
    log_det: Tensor
    """log|det W|, 0-dim: of one pixel."""
    alone: Callable[[Tensor], Evaluated] | None = None
    """A quicker way to evaluate it where it has no neighbour to be folded with."""


class LazyMap(NamedTuple):
    """A layer's :class:`ChannelMap`, or its inverse, computed only where it is folded with a neighbour.

    Maps of one ``kind`` are computed in one go, and inverses follow from the very matrix that the other direction
    applies, neighbours and roundings included.
    """

    layer: nn.Module
    """Whose parameters and buffers it depends on."""
    stack: Callable[[Sequence[Any]], ChannelMap]
    """From N layers of this kind, the stack of their maps, data to latent."""
    kind: Hashable
    """Equal for layers that ``stack`` can take together: same shapes, dtypes, devices, options."""
    channels: int
    """C."""
    alone: Callable[[bool, Tensor], Evaluated]
    """Evaluates it where it has no neighbour to be folded with: data to latent or, with True, latent to data."""
    diagonal: bool = False
    """Whether the weight is (C,)."""
    inverse: bool = False
    """Latent to data."""


Map = ChannelMap | LazyMap


def is_diagonal(map: Map) -> bool:
    """Whether the map's matrix is a diagonal one, given as such."""
    return map.diagonal if isinstance(map, LazyMap) else map.weight.dim() == map.log_det.dim() + 1


def fold(first: ChannelMap, second: ChannelMap) -> ChannelMap:
    """``second`` after ``first``, as one map."""
    bias = second.bias
    if first.bias is not None:
        moved = _times(second, first.bias)
        bias = moved if bias is None else moved + bias
    if is_diagonal(first):
        weight = second.weight * (first.weight if is_diagonal(second) else first.weight[..., None, :])
    elif is_diagonal(second):
        weight = second.weight[..., None] * first.weight
    else:
        # In float64, where neither autocast nor TF32 apply.
        dtype = torch.promote_types(first.weight.dtype, second.weight.dtype)
        weight = (second.weight.double() @ first.weight.double()).to(dtype)
    return ChannelMap(weight, bias, first.log_det + second.log_det)


def fold_all(groups: Sequence[Sequence[Map]], dtype: torch.dtype, name: str) -> list[ChannelMap]:
    """Each group of neighbours, in the order of evaluation, as one map in ``dtype``.

    Groups of the same build are computed as one stack: a chain of any length takes as many operations as a short one.

    Args:
        name: what a warning of a numerically singular matrix calls the chain.
    """
    folded: dict[int, ChannelMap] = {}
    for indices in _alike(groups):
        inverse = [isinstance(map, LazyMap) and map.inverse for map in groups[indices[0]]]
        if any(inverse):
            indices.reverse()  # warnings count from data to latent
        stacks = [_stack(column) for column in zip(*(groups[index] for index in indices))]
        folded.update(zip(indices, _unstack(_fold_stacks(stacks, inverse, dtype, name))))
    return [folded[index] for index in range(len(groups))]


def invert_all(maps: Sequence[ChannelMap]) -> list[ChannelMap]:
    """The inverses of maps, each in the map's dtype, those of one size in one go."""
    inverses: dict[int, ChannelMap] = {}
    for indices in _alike([(map,) for map in maps]):
        inverse = _inverted(_stack([maps[index] for index in indices]), None)
        inverses.update(zip(indices, _unstack(_rounded(inverse, maps[indices[0]].weight.dtype))))
    return [inverses[index] for index in range(len(maps))]


def _fold_stacks(stacks: list[ChannelMap], inverse: list[bool], dtype: torch.dtype, name: str) -> ChannelMap:
    """Stacks of neighbours, each either the map to be applied or one whose inverse is."""
    parts = []
    for undone, run in groupby(zip(inverse, stacks), key=lambda pair: pair[0]):
        maps = [stack for _, stack in run]
        parts.append(_inverted(_rounded(reduce(fold, reversed(maps)), dtype), name) if undone else reduce(fold, maps))
    return _rounded(reduce(fold, parts), dtype)


def _inverted(maps: ChannelMap, name: str | None) -> ChannelMap:
    """The inverses of a stack in float64, to be rounded once. With a name, warns of numerically singular matrices."""
    if is_diagonal(maps):
        weight = maps.weight.double().reciprocal()
    elif name is None:
        weight = lu(maps.weight.double())[1]
    else:  # one matrix is no stack to the reader of the warning
        weight = invert(maps.weight[0] if len(maps.weight) == 1 else maps.weight, name).view_as(maps.weight)
    inverse = ChannelMap(weight, None, -maps.log_det)
    return inverse if maps.bias is None else inverse._replace(bias=-_times(inverse, maps.bias.double()))


def _rounded(map: ChannelMap, dtype: torch.dtype) -> ChannelMap:
    return ChannelMap(map.weight.to(dtype), None if map.bias is None else map.bias.to(dtype), map.log_det)


def _alike(groups: Sequence[Sequence[Map]]) -> Iterable[list[int]]:
    """The indices of groups of the same build, which can be stacked."""
    alike: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault(tuple(_build(map) for map in group), []).append(index)
    return alike.values()


def _build(map: Map) -> Hashable:
    if isinstance(map, LazyMap):
        return map.kind, map.inverse
    tensors = [tensor for tensor in map[:3] if tensor is not None]
    return tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)


def _stack(maps: Sequence[Map]) -> ChannelMap:
    if isinstance(maps[0], LazyMap):
        return maps[0].stack([map.layer for map in maps])
    weights, biases, log_dets = zip(*(map[:3] for map in maps))
    return ChannelMap(stack(weights), None if biases[0] is None else stack(biases), stack(log_dets))


def _unstack(maps: ChannelMap) -> list[ChannelMap]:
    weights, log_dets = maps.weight.unbind(), maps.log_det.unbind()
    biases = (None,) * len(weights) if maps.bias is None else maps.bias.unbind()
    return [ChannelMap(*fields) for fields in zip(weights, biases, log_dets)]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """:func:`torch.stack`, without a copy where there is nothing to stack."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))


def _times(map: ChannelMap, vector: Tensor) -> Tensor:
    """W·v, as a sum: matrix products are rounded more under autocast, and with TF32."""
    return map.weight * vector if is_diagonal(map) else (map.weight * vector[..., None, :]).sum(-1)
