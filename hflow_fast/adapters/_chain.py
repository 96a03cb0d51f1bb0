"""Chains of layers that permute, mix or couple channels, as the pieces of :mod:`hflow_fast.nn._fusion`.

All that stands between two couplings becomes one map, permutations included; and the maps of a whole chain are
assembled together, in as many calls as those of one layer.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Callable, Hashable, Iterable, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor

from .._checks import compute_dtype
from ..nn._folding import ChannelMap, fold, inverted, unstack
from ..nn._fusion import Coupling, Evaluated, Opaque, Piece, run
from ..nn._plu import compose

__all__ = ["Map", "MapLayer", "Orders", "Part", "Shuffle", "constant", "evaluate", "permutation", "pieces", "plu",
           "undone", "zeros"]

_MIXED_CHANNELS = 32
"""Up to as many channels a map is as good as free behind a coupling (:func:`hflow_fast.ops.flow_step`); with more, one
that is no full matrix costs less on its own."""


class MapLayer(Protocol):
    """A fast layer that is one linear map of the channels of every pixel."""

    mixes: bool
    """Whether it is a full matrix; otherwise it is a scale and a shift."""

    def kind(self) -> Hashable:
        """Layers of the same kind can be stacked."""

    def map_channels(self) -> int:
        """C."""

    def alone(self, x: Tensor, inverse: bool) -> Evaluated:
        """One pass without a matrix; where it does not mix."""

    @staticmethod
    def stacked(layers: Sequence[Any], inverse: bool) -> ChannelMap:
        """The maps of ``layers``, all of one kind; float64 where a matrix is inverted."""


class Map(NamedTuple):
    """One direction of a layer; ``inverse``: latent → data."""

    layer: MapLayer
    inverse: bool

    @property
    def channels(self) -> int:
        return self.layer.map_channels()

    @property
    def kind(self) -> Hashable:
        return type(self.layer), self.inverse, self.layer.kind()


class Shuffle(NamedTuple):
    """Channel i of the result is channel ``order[i]``."""

    order: tuple[int, ...]
    alone: Callable[[Tensor], Evaluated] | None = None
    """A quicker way to evaluate it where nothing is folded with it."""

    @property
    def inverted(self) -> Shuffle:
        """The one that undoes it."""
        inverse = [0] * len(self.order)
        for position, channel in enumerate(self.order):
            inverse[channel] = position
        return Shuffle(tuple(inverse))

    @property
    def is_identity(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    @property
    def channels(self) -> int:
        return len(self.order)

    @property
    def kind(self) -> Hashable:
        return self.order


class Orders:
    """A fixed permutation and what undoes it."""

    def __init__(self, order: tuple[int, ...]) -> None:
        self.forward = Shuffle(order)
        self.inverse = self.forward.inverted


Part = Map | Shuffle | Coupling | Opaque
Segment = list[Map | Shuffle]
"""Neighbours that become one map, or none."""


def evaluate(parts: Iterable[Part], x: Tensor) -> Evaluated:
    """``parts``, in the order of evaluation, on ``x`` (B, C, …): the result and log|det| (B,).

    Nothing is kept from call to call: the code around such models may write to ``parameter.data``, which leaves no
    trace.
    """
    return run(pieces(parts, x), x)


def pieces(parts: Iterable[Part], x: Tensor) -> list[Piece]:
    """What :func:`evaluate` runs: neighbours folded."""
    found: list[Piece | int] = []
    segments: list[Segment] = []
    for part in _segmented(parts):
        if not isinstance(part, list):
            found.append(part)
            continue
        behind_coupling = len(found) > 0 and isinstance(found[-1], Coupling)
        if not any(isinstance(link, Map) and link.layer.mixes for link in part):
            if part[0].channels > _MIXED_CHANNELS or (len(part) == 1 and not behind_coupling):
                found += map(_on_its_own, part)
                continue
            if all(isinstance(link, Shuffle) for link in part):
                found.append(permutation(part[0].order, compute_dtype(x), x.device))
                continue
        found.append(len(segments))
        segments.append(part)
    maps = _folded(segments, x)
    return [maps[piece] if isinstance(piece, int) else piece for piece in found]


def _segmented(parts: Iterable[Part]) -> Iterable[Coupling | Opaque | Segment]:
    """With neighbouring maps in a list, which has no two shuffles side by side and none that changes nothing."""
    segment: Segment = []
    for part in parts:
        if isinstance(part, Shuffle):
            if segment and isinstance(segment[-1], Shuffle):
                before = segment.pop().order
                part = Shuffle(tuple(before[channel] for channel in part.order))
            if not part.is_identity:
                segment.append(part)
        elif isinstance(part, Map):
            segment.append(part)
        else:
            if segment:
                yield segment
            segment = []
            yield part
    if segment:
        yield segment


def _on_its_own(part: Map | Shuffle) -> Opaque:
    if isinstance(part, Map):
        return Opaque(functools.partial(part.layer.alone, inverse=part.inverse))
    return Opaque(part.alone or (lambda x: (x.index_select(1, _index(part.order, x.device)), zeros(x))))


def _folded(segments: list[Segment], x: Tensor) -> list[ChannelMap]:
    """Each segment as one map; segments of the same layers are assembled together."""
    groups: dict[Hashable, list[int]] = {}
    for index, segment in enumerate(segments):
        groups.setdefault(tuple(link.kind for link in segment), []).append(index)
    maps: list[ChannelMap | None] = [None] * len(segments)
    with _without_autocast(x):
        for members in groups.values():
            columns = (_stacked(column) for column in zip(*(segments[index] for index in members)))
            folded = functools.reduce(_fold, columns)
            for index, channel_map in zip(members, unstack(folded, compute_dtype(x))):
                maps[index] = channel_map
    return maps


def _stacked(links: tuple[Map | Shuffle, ...]) -> ChannelMap | Shuffle:
    """Links of one kind."""
    first = links[0]
    return first if isinstance(first, Shuffle) else first.layer.stacked([link.layer for link in links], first.inverse)


def _fold(first: ChannelMap | Shuffle, second: ChannelMap | Shuffle) -> ChannelMap:
    """``second`` after ``first``, of which one at most is a shuffle."""
    if isinstance(first, Shuffle):
        columns = _index(first.inverted.order, second.weight.device)
        return second._replace(weight=_matrices(second.weight).index_select(2, columns))
    if isinstance(second, Shuffle):
        rows = _index(second.order, first.weight.device)
        return first._replace(weight=_matrices(first.weight).index_select(1, rows),
                              bias=None if first.bias is None else first.bias.index_select(1, rows))
    return fold(first, second)


def _matrices(weight: Tensor) -> Tensor:
    return torch.diag_embed(weight) if weight.dim() == 2 else weight


def undone(maps: ChannelMap, name: str) -> ChannelMap:
    """The inverses of a stack, as :func:`~hflow_fast.nn._folding.inverted`. It warns of numerically singular matrices
    on a CPU only: on a GPU, looking for them would stall each call."""
    return inverted(maps, name if maps.weight.device.type == "cpu" else None)


def plu(permutation: Tensor, lower: Tensor, upper: Tensor, sign: Tensor, log_diagonal: Tensor) -> ChannelMap:
    """P times what :func:`compose` makes of the others: matrices (N, C, C), vectors (N, C)."""
    product, log_det = compose(lower, upper, sign, log_diagonal)
    return ChannelMap(permutation @ product, None, log_det)


def zeros(x: Tensor) -> Tensor:
    """A log-det of nothing, (B,)."""
    return x.new_zeros(x.shape[0], dtype=compute_dtype(x))


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Matrices keep their precision."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def constant(make: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a tensor of no parameter once for each list of arguments, for training and for inference mode alike."""
    @functools.lru_cache(maxsize=512)
    def keep(*arguments: Hashable) -> Any:
        with torch.inference_mode(False):
            return make(*arguments)

    return lambda *arguments: make(*arguments) if torch.compiler.is_compiling() else keep(*arguments)


@constant
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(order, device=device)


@constant
def permutation(order: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ChannelMap:
    """A :class:`Shuffle` as a map."""
    matrix = torch.eye(len(order), dtype=dtype, device=device)[list(order)]
    return ChannelMap(matrix, None, matrix.new_zeros(()))
