"""Running a chain of channel maps and couplings in as few passes over the flow variable as possible.

Between two coupling networks every flow of this family is a coupling and then maps that are linear per pixel (actnorms,
1 × 1 convolutions, permutations). Layers, models and adapters describe a direction as :data:`Piece` after
:data:`Piece`, in the order of evaluation; :func:`run` folds neighbouring maps into one matrix and hands each coupling
and the map behind it to :func:`hflow_fast.ops.flow_step`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Callable, Iterable, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .._checks import compute_dtype
from ..ops import CouplingSpec, conv1x1, coupling, flow_step
from ..ops.flow_step import MAX_FUSED_CHANNELS
from ._cache import ParameterCache
from ._folding import ChannelMap, Evaluated, LazyMap, Map, fold, fold_all, is_diagonal
from ._hooks import is_watched

__all__ = ["ChannelMap", "Coupling", "LazyMap", "LogDet", "Opaque", "Piece", "Step", "apply_map", "coupling_then_map",
           "evaluate", "fold", "fold_maps", "is_altered", "per_sample", "pieces_of", "run", "steps_of"]


class Coupling(NamedTuple):
    """One direction of :func:`hflow_fast.ops.coupling`."""

    raw: Callable[[Tensor], Tensor]
    """The network: flow variable → raw parameters. It must look at passive elements only."""
    spec: CouplingSpec
    inverse: bool = False
    layer: nn.Module | None = None
    """Whose parameters ``raw`` uses."""


class Opaque(NamedTuple):
    """Anything else."""

    function: Callable[[Tensor], Evaluated]
    undo: Callable[[Tensor], Evaluated] | None = None
    """The inverse of ``function``."""
    layer: nn.Module | None = None
    """Whose parameters they use."""


Piece = ChannelMap | LazyMap | Coupling | Opaque


class Step(NamedTuple):
    """What is evaluated in one pass: at most one coupling or opaque piece, and then the maps behind a coupling."""

    first: Coupling | Opaque | None
    maps: tuple[Map, ...] = ()

    @property
    def folds(self) -> bool:
        """Whether there are maps to fold: not for one alone that knows a quicker way."""
        if len(self.maps) == 1:
            return self.first is not None or self.maps[0].alone is None
        return len(self.maps) > 1


def pieces_of(layer: nn.Module, inverse: bool, context: Tensor | None = None) -> list[Piece]:
    """How to evaluate a direction of a layer ``z, log_det = layer(x, context)`` with a ``layer.inverse``.

    That is what its ``pieces(inverse, context)`` says, if it has such a method and nothing else to be done: hooks have
    to run, and a subclass with a ``forward`` or ``inverse`` of its own is called.
    """
    if _offers_pieces(type(layer)) and not is_altered(layer):
        return layer.pieces(inverse, context)
    there, back = partial(_forward, layer, context), partial(_inverse, layer, context)
    return [Opaque(back, there, layer) if inverse else Opaque(there, back, layer)]


def run(pieces: Iterable[Piece], x: Tensor, cache: ParameterCache | None = None, name: str = "flow") -> Evaluated:
    """Evaluates ``pieces`` one after another on ``x`` (B, C, …): the result and log|det| (B,).

    Args:
        cache: keeps the folded maps while gradients are off; of one chain, in any of its directions.
        name: what a warning of a numerically singular matrix calls the chain.
    """
    steps = steps_of(pieces)
    log_det = LogDet()
    for step, folded in zip(steps, fold_maps(steps, x, cache, name)):
        if folded is None and step.maps:
            x, term = step.maps[0].alone(x)
        else:
            x, term = evaluate(step.first, folded and folded.weight, folded and folded.bias, x)
            if folded is not None:
                log_det.add_map(folded.log_det, x)
        if term is not None:
            log_det.add(term)
    return x, log_det.total(x)


def steps_of(pieces: Iterable[Piece]) -> list[Step]:
    """``pieces`` as they are evaluated together."""
    steps: list[Step] = []
    first: Coupling | Opaque | None = None
    maps: list[Map] = []
    for piece in pieces:
        if isinstance(piece, (ChannelMap, LazyMap)):
            if not _joins(piece, first, maps):
                steps.append(_step(first, maps))
                first, maps = None, []
            maps.append(piece)
            continue
        if first is not None or maps:
            steps.append(_step(first, maps))
        first, maps = piece, []
    if first is not None or maps:
        steps.append(_step(first, maps))
    return steps


def fold_maps(steps: Sequence[Step], x: Tensor, cache: ParameterCache | None = None,
              name: str = "flow") -> list[ChannelMap | None]:
    """The one map of each step on ``x``, None for steps without any; arguments as :func:`run`."""
    groups = [step.maps for step in steps if step.folds]
    if not groups:
        return [None] * len(steps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        folded = fold_all(groups, dtype, name)
    else:
        build = dtype, *(tuple(isinstance(map, LazyMap) and map.inverse for map in group) for group in groups)
        tensors = [tensor for group in groups for map in group for tensor in _tensors_of(map)]
        folded = cache.get(build, tensors, lambda: fold_all(groups, dtype, name))
    remaining = iter(folded)
    return [next(remaining) if step.folds else None for step in steps]


def evaluate(first: Coupling | Opaque | None, weight: Tensor | None, bias: Tensor | None,
             x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``first`` and the map y = W x + b behind it: the result, and log|det| (B,) of ``first`` if there is any."""
    if isinstance(first, Opaque):
        return first.function(x)
    if weight is None:
        return coupling(x, first.raw(x), first.spec, inverse=first.inverse)
    if first is None:
        return apply_map(x, weight, bias), None
    return coupling_then_map(first, first.raw(x), weight, bias, x)


def coupling_then_map(first: Coupling, raw: Tensor, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Evaluated:
    """A coupling, given its network's output, and the map y = W x + b behind it, if there is one."""
    if weight is None:
        return coupling(x, raw, first.spec, inverse=first.inverse)
    if weight.dim() == 1:
        weight = torch.diag(weight)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    return flow_step(x, raw, weight, bias, first.spec, inverse=first.inverse)


def apply_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b at every pixel; W (C, C), or (C,): its diagonal."""
    if weight.dim() == 2:
        return conv1x1(x, weight, bias)
    dtype, shape = compute_dtype(x), (-1, *(1,) * (x.dim() - 2))
    y = x.to(dtype) * weight.to(dtype).view(shape)
    if bias is not None:
        y = y + bias.to(dtype).view(shape)
    # Under autocast flow variables keep their precision, as in the other operations.
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


class LogDet:
    """Adds up log-dets of a chain; those of maps per pixel, as long as there are as many pixels."""

    def __init__(self) -> None:
        self._terms: list[Tensor] = []
        self._per_pixel: list[Tensor] = []
        self._shape: tuple[int, ...] = ()

    def add(self, term: Tensor) -> None:
        """That of a layer, (B,)."""
        self._terms.append(term)

    def add_map(self, log_det: Tensor, x: Tensor) -> None:
        """That of a map at every pixel of ``x`` (B, C, …), 0-dim."""
        if self._per_pixel and self._shape != x.shape:
            self._flush()
        self._per_pixel.append(log_det)
        self._shape = x.shape

    def total(self, x: Tensor) -> Tensor:
        """The sum, (B,), in float32 or better."""
        self._flush()
        dtype, batch = torch.promote_types(x.dtype, torch.float32), x.shape[:1]
        for term in self._terms:
            dtype = torch.promote_types(dtype, term.dtype)
        terms = [term.to(dtype).expand(batch) for term in self._terms]
        if not terms:
            return x.new_zeros(batch, dtype=dtype)
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(dim=0)

    def _flush(self) -> None:
        if self._per_pixel:
            log_dets = self._per_pixel
            per_pixel = log_dets[0] if len(log_dets) == 1 else torch.stack(log_dets).sum()
            self._terms.append(per_sample(per_pixel, self._shape))
            self._per_pixel = []


def per_sample(per_pixel: Tensor, shape: Sequence[int]) -> Tensor:
    """A 0-dim log-det per pixel, times the number of pixels, for every sample of a ``shape`` (B, C, …): (B,)."""
    dtype = torch.promote_types(per_pixel.dtype, torch.float32)
    return (per_pixel.to(dtype) * math.prod(shape[2:])).expand(shape[0])


def _joins(map: Map, first: Coupling | Opaque | None, maps: list[Map]) -> bool:
    """Whether a map runs in one pass with what stands before it."""
    if isinstance(first, Opaque) or any(_channels(other) != _channels(map) for other in maps[-1:]):
        return False
    if _channels(map) <= MAX_FUSED_CHANNELS:
        return True
    # Beyond, a coupling and a matrix are two passes in any case, and an actnorm is quicker than a matrix. Nor is the
    # product of two large matrices always cheaper than applying both.
    return first is None and (is_diagonal(map) or all(is_diagonal(other) for other in maps))


def _step(first: Coupling | Opaque | None, maps: list[Map]) -> Step:
    if first is None and len(maps) == 1 and isinstance(maps[0], LazyMap):
        alone, inverse = maps[0].alone, maps[0].inverse
        return Step(Opaque(partial(alone, inverse), partial(alone, not inverse), maps[0].layer))
    return Step(first, tuple(maps))


def _channels(map: Map) -> int:
    return map.channels if isinstance(map, LazyMap) else map.weight.shape[-1]


def _tensors_of(map: Map) -> list[Tensor]:
    if isinstance(map, ChannelMap):
        return [tensor for tensor in map[:3] if tensor is not None]
    layer = map.layer
    if layer._modules:  # parametrizations
        return [*layer.parameters(), *layer.buffers()]
    return [tensor for table in (layer._parameters, layer._buffers) for tensor in table.values() if tensor is not None]


def _offers_pieces(kind: type) -> bool:
    """Whether the pieces are what ``forward`` and ``inverse`` do: not so if a subclass overrides just these."""
    for base in kind.__mro__:
        if "pieces" in vars(base):
            return True
        if "forward" in vars(base) or "inverse" in vars(base):
            return False
    return False


def is_altered(layer: nn.Module) -> bool:
    """Whether calling the layer is more than running its class's methods."""
    return bool(
        is_watched(layer) or "forward" in vars(layer) or "inverse" in vars(layer)
        or not torch.compiler.is_compiling() and torch_module._has_any_global_hook()
    )


def _forward(layer: nn.Module, context: Tensor | None, x: Tensor) -> Evaluated:
    return layer(x, context)


def _inverse(layer: nn.Module, context: Tensor | None, x: Tensor) -> Evaluated:
    return layer.inverse(x, context)
