"""Evaluating flows of normflows one after another in as few passes as possible.

A direction is named as in normflows: *sampling* is latent to data, ``forward``; the other is its ``inverse``.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any, Hashable, Iterable, Iterator, Protocol, Sequence

import torch
from torch import Tensor, nn

from ..._checks import compute_dtype
from ...nn._fusion import ChannelMap, Opaque, Piece, run
from .._stacked import StackedMaps, fold, unstack

__all__ = ["Fused", "MapLayer", "call", "evaluate", "links", "pieces_of"]

_MOST_CHANNELS_UNMIXED = 32
"""Up to here a diagonal or a permutation behind a coupling is worth making a matrix of; beyond, the kernel that does a
coupling and a matrix in one pass does not exist."""


class MapLayer(Protocol):
    """A fast layer that is one linear map of the channels of every pixel."""

    mixes: bool
    """Whether it is a matrix anyway, neither diagonal nor a permutation."""

    def kind(self, x: Tensor) -> Hashable:
        """Layers of the same kind can be stacked."""

    def channels(self) -> int:
        """C."""

    @staticmethod
    def stacked(layers: Sequence[Any], x: Tensor, sampling: bool) -> StackedMaps:
        """The maps of ``layers``, all of the same kind, for flow variables like ``x``; float64 where inverted."""


Link = MapLayer | Piece


class Fused:
    """Mixed into the fast class of a layer that can say what it consists of.

    In front of the stock class, whose methods serve what the kernels do not.
    """

    def links(self, x: Tensor, sampling: bool) -> Iterable[Link] | None:
        """What a direction consists of, in order of evaluation, for flow variables like ``x``. None: not fusible."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,)."""
        return self._evaluate(z, True) if self.links(z, True) is not None else super().forward(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,)."""
        return self._evaluate(z, False) if self.links(z, False) is not None else super().inverse(z)

    def _evaluate(self, z: Tensor, sampling: bool) -> tuple[Tensor, Tensor]:
        y, log_det = evaluate([self], z, sampling)
        return y, log_det.to(z.dtype)


def evaluate(layers: Iterable[nn.Module], x: Tensor, sampling: bool) -> tuple[Tensor, Tensor]:
    """Runs ``layers`` in this order on ``x`` (B, C, …): the result and log|det| (B,).

    Nothing is kept from call to call: the code around such models may write to ``parameter.data``, which leaves no
    trace.
    """
    return run(pieces_of(layers, x, sampling), x)


def links(layers: Iterable[nn.Module], x: Tensor, sampling: bool) -> Iterator[Link]:
    """What ``layers``, fast ones and others, consist of."""
    for layer in layers:
        inner = layer.links(x, sampling) if isinstance(layer, Fused) else None
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


def pieces_of(layers: Iterable[nn.Module], x: Tensor, sampling: bool) -> list[Piece]:
    """What :func:`evaluate` runs, neighbouring maps folded."""
    pieces: list[Piece | int] = []
    segments: list[list[MapLayer]] = []
    for segment in _segmented(links(layers, x, sampling)):
        if not isinstance(segment, list):
            pieces.append(segment)
        elif segment[0].channels() > _MOST_CHANNELS_UNMIXED and not any(layer.mixes for layer in segment):
            pieces += [Opaque(partial(call, layer, sampling)) for layer in segment]
        else:
            pieces.append(len(segments))
            segments.append(segment)
    maps = _folded(segments, x, sampling)
    return [maps[piece] if isinstance(piece, int) else piece for piece in pieces]


def _segmented(chain: Iterable[Link]) -> Iterator[Piece | list[MapLayer]]:
    """With neighbouring map layers in a list."""
    segment: list[MapLayer] = []
    for link in chain:
        if isinstance(link, Fused):
            segment.append(link)
            continue
        if segment:
            yield segment
        segment = []
        yield link
    if segment:
        yield segment


def _folded(segments: list[list[MapLayer]], x: Tensor, sampling: bool) -> list[ChannelMap]:
    """Each segment as one map; segments of the same layers are computed together."""
    groups: dict[Hashable, list[int]] = {}
    for index, segment in enumerate(segments):
        groups.setdefault(tuple(layer.kind(x) for layer in segment), []).append(index)
    maps: list[ChannelMap | None] = [None] * len(segments)
    for members in groups.values():
        columns = zip(*(segments[index] for index in members))
        with torch.autocast(x.device.type, enabled=False):
            folded = reduce(fold, (layers[0].stacked(layers, x, sampling) for layers in columns))
        for index, channel_map in zip(members, unstack(folded, compute_dtype(x))):
            maps[index] = channel_map
    return maps
