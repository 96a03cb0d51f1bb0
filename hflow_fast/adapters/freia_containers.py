"""FrEIA's containers, with all that stands between two coupling networks in one pass, across layers."""

from __future__ import annotations

from itertools import groupby
from typing import Any, Iterable, Sequence

import torch
from FrEIA import framework as stock
from torch import Tensor, nn

from ..nn._fusion import Piece, run
from .freia_all_in_one import AllInOneBlock, surroundings
from .freia_base import FusedLayer, calls_alone

__all__ = ["GraphINN", "ReversibleGraphNet", "ReversibleSequential", "SequenceINN"]


class _Chain:
    """A tensor, and layers that wait to be applied to it together, in the order of evaluation."""

    def __init__(self, x: Tensor, inverse: bool) -> None:
        self._x = x
        self._inverse = inverse
        self._layers: list[tuple[FusedLayer, Sequence[Tensor]]] = []

    def append(self, layer: FusedLayer, context: Sequence[Tensor]) -> None:
        self._layers.append((layer, context))

    def evaluate(self) -> tuple[Tensor, Tensor | float]:
        """The result, and its log|det|: (B,), or 0 where nothing waits."""
        return run(self._pieces(), self._x) if self._layers else (self._x, 0)

    def _pieces(self) -> Iterable[Piece]:
        for likeness, layers in groupby(self._layers, lambda entry: _likeness(entry[0])):
            blocks, contexts = zip(*layers)
            if isinstance(blocks[0], AllInOneBlock):
                around = surroundings(blocks, self._inverse)
                for block, own, context in zip(blocks, around, contexts):
                    yield from block.within(own, self._inverse, context)
            else:
                yield from blocks[0].pieces(self._inverse, contexts[0], self._x)


def _likeness(layer: FusedLayer) -> Any:
    return layer.likeness() if isinstance(layer, AllInOneBlock) else id(layer)


def _can_wait(layer: nn.Module) -> bool:
    return isinstance(layer, FusedLayer) and not calls_alone(layer)


class _Container:
    """Base of the fast containers."""

    @staticmethod
    def unfit(container: nn.Module) -> str:
        return ""

    @staticmethod
    def networks(container: nn.Module) -> tuple[nn.Module, ...]:
        return tuple(container.module_list)

    def fuses(self) -> bool:
        """Whether there is something to fuse. Without, the stock class knows how to add up log-dets that are numbers."""
        return any(_can_wait(layer) and layer.log_det_per_sample for layer in self.module_list)


class SequenceINN(_Container, stock.SequenceINN):
    """Layers one after another."""

    def forward(self, x_or_z: Tensor | Sequence[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False,
                jac: bool = True) -> tuple[Tensor | tuple[Tensor], Tensor]:
        if not self.fuses():
            return super().forward(x_or_z, c, rev, jac)
        layers = list(zip(self.module_list, self.conditions))
        log_det: Tensor | float = 0
        chain = _Chain(x_or_z if torch.is_tensor(x_or_z) else x_or_z[0], rev)
        for layer, condition in reversed(layers) if rev else layers:
            context = () if condition is None else (c[condition],)
            if _can_wait(layer):
                chain.append(layer, context)
                continue
            x, term = chain.evaluate()
            (y,), own = layer((x,), c=list(context), rev=rev, jac=jac) if context else layer((x,), rev=rev, jac=jac)
            log_det = log_det + term + own
            chain = _Chain(y, rev)
        y, term = chain.evaluate()
        return (y,) if self.force_tuple_output else y, log_det + term


class ReversibleSequential(stock.ReversibleSequential, SequenceINN):
    """The older name of :class:`SequenceINN`."""


class GraphINN(_Container, stock.GraphINN):
    """Layers in a graph, where those between two forks wait for one another."""

    def forward(self, x_or_z: Tensor | Sequence[Tensor], c: Tensor | Sequence[Tensor] | None = None, rev: bool = False,
                jac: bool = True, intermediate_outputs: bool = False,
                x: Tensor | Sequence[Tensor] | None = None) -> tuple[Any, Any]:
        inputs = [x_or_z] if torch.is_tensor(x_or_z) else x_or_z
        conditions = [c] if torch.is_tensor(c) else [] if c is None else c
        starts, ends = (self.out_nodes, self.in_nodes) if rev else (self.in_nodes, self.out_nodes)
        countable = len(conditions) == len(self.condition_nodes) and x is None and len(inputs) == len(starts)
        if intermediate_outputs or not countable or not self.fuses():
            return super().forward(x_or_z, c, rev, jac, intermediate_outputs, x)
        given = dict(zip(self.condition_nodes, conditions))
        waiting = {(node, 0): _Chain(value, rev) for node, value in zip(starts, inputs)}
        log_det = torch.zeros(inputs[0].shape[0]).to(inputs[0])
        for node in reversed(self.node_list) if rev else self.node_list:
            if node.module is None:
                continue
            chains = [waiting.pop(source) for source in (node.outputs if rev else node.inputs)]
            context = tuple(given[condition] for condition in node.conditions)
            if len(chains) == 1 and _can_wait(node.module):
                chains[0].append(node.module, context)
                waiting[node, 0] = chains[0]
                continue
            values, terms = zip(*(chain.evaluate() for chain in chains))
            outputs, own = self._call(node, values, context, rev, jac)
            waiting.update(((node, index), _Chain(value, rev)) for index, value in enumerate(outputs))
            if jac:
                log_det = sum((*terms, own), log_det)
        results = []
        for node in ends:
            result, term = waiting[(node.outputs if rev else node.inputs)[0]].evaluate()
            results.append(result)
            log_det = log_det + term if jac else log_det
        return results[0] if len(results) == 1 and not self.force_tuple_output else tuple(results), log_det

    def _call(self, node: stock.Node, values: tuple[Tensor, ...], context: tuple[Tensor, ...], rev: bool,
              jac: bool) -> tuple[Sequence[Tensor], Tensor]:
        try:
            result = node.module(values, **({"c": context} if context else {}), rev=rev, jac=jac)
        except Exception as error:
            raise RuntimeError(f"{node} failed: {error}") from error
        return self._check_output(node, result, jac, rev)


class ReversibleGraphNet(stock.ReversibleGraphNet, GraphINN):
    """The older name of :class:`GraphINN`."""
