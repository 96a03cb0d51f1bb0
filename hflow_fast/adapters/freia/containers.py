"""FrEIA's containers, with all that stands between two coupling networks in one pass, across layers."""

from __future__ import annotations

from itertools import groupby
from typing import Any, Iterable, Sequence

import torch
from FrEIA import framework as stock
from torch import Tensor, nn

from ...nn._fusion import Piece, is_altered, run
from .all_in_one import AllInOneBlock, surroundings
from .base import FusedLayer

__all__ = ["GraphINN", "ReversibleGraphNet", "ReversibleSequential", "SequenceINN"]


class _Chain:
    """A tensor, and layers that wait to be applied to it together, in the order of evaluation."""

    def __init__(self, x: Tensor, inverse: bool) -> None:
        self._x = x
        self._inverse = inverse
        self._layers: list[tuple[FusedLayer, Sequence[Tensor]]] = []

    def append(self, layer: FusedLayer, context: Sequence[Tensor]) -> None:
        self._layers.append((layer, context))

    def evaluate(self, terms: list[Tensor]) -> Tensor:
        """The result; its log|det| (B,) goes to ``terms``, if a layer waits.

        Raises:
            RuntimeError: A layer cannot be applied, as FrEIA's graphs say it.
        """
        if not self._layers:
            return self._x
        try:
            y, log_det = run(self._pieces(), self._x)
        except Exception as error:
            names = " → ".join(type(layer).__name__ for layer, _ in self._layers)
            raise RuntimeError(f"{names}: {error}") from error
        terms.append(log_det)
        return y

    def _pieces(self) -> Iterable[Piece]:
        for _, layers in groupby(self._layers, lambda entry: _likeness(entry[0])):
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
    return isinstance(layer, FusedLayer) and not is_altered(layer)


class _Container:
    """Base of the fast containers."""

    @staticmethod
    def unfit(container: nn.Module) -> str:
        """Why a stock ``container`` has to stay as it is; "": it need not."""
        return ""

    @staticmethod
    def networks(container: nn.Module) -> tuple[nn.Module, ...]:
        """What it goes on calling."""
        return tuple(container.module_list)

    def fuses(self) -> bool:
        """Whether there is something to fuse. Otherwise all log-dets may be numbers, which the stock class adds up."""
        return any(_can_wait(layer) and layer.log_det_per_sample for layer in self.module_list)


class SequenceINN(_Container, stock.SequenceINN):
    """Layers one after another."""

    def forward(self, x_or_z: Tensor | Sequence[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False,
                jac: bool = True) -> tuple[Tensor | tuple[Tensor], Tensor]:
        if not self.fuses():
            return super().forward(x_or_z, c, rev, jac)
        layers = list(zip(self.module_list, self.conditions))
        terms: list[Tensor] = []
        chain = _Chain(x_or_z if torch.is_tensor(x_or_z) else x_or_z[0], rev)
        for layer, condition in reversed(layers) if rev else layers:
            context = () if condition is None else (c[condition],)
            if _can_wait(layer):
                chain.append(layer, context)
                continue
            x = (chain.evaluate(terms),)
            (y,), log_det = layer(x, c=list(context), rev=rev, jac=jac) if context else layer(x, rev=rev, jac=jac)
            terms.append(log_det)
            chain = _Chain(y, rev)
        y = chain.evaluate(terms)
        return (y,) if self.force_tuple_output else y, sum(terms[1:], terms[0])


class ReversibleSequential(stock.ReversibleSequential, SequenceINN):
    """The older name of :class:`SequenceINN`."""


class GraphINN(_Container, stock.GraphINN):
    """Layers in a graph, where those between two forks wait for one another."""

    @staticmethod
    def unfit(container: nn.Module) -> str:
        used = [source for node in container.node_list for source in node.inputs]
        if len(set(used)) < len(used):
            return "an output goes to two nodes"
        conditions = {condition for node in container.node_list for condition in node.conditions}
        return "" if conditions <= set(container.condition_nodes) else "a condition is the output of a layer"

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
        terms = [torch.zeros(inputs[0].shape[0]).to(inputs[0])]
        for node in reversed(self.node_list) if rev else self.node_list:
            if node.module is None:
                continue
            chains = [waiting.pop(source) for source in (node.outputs if rev else node.inputs)]
            context = tuple(given[condition] for condition in node.conditions)
            if _can_wait(node.module):
                chains[0].append(node.module, context)
                waiting[node, 0] = chains[0]
                continue
            outputs, log_det = self._call(node, tuple(chain.evaluate(terms) for chain in chains), context, rev, jac)
            waiting.update(((node, index), _Chain(output, rev)) for index, output in enumerate(outputs))
            if jac:
                terms.append(log_det)
        results = tuple(waiting[(node.outputs if rev else node.inputs)[0]].evaluate(terms) for node in ends)
        log_det = sum(terms[1:], terms[0]) if jac else terms[0]
        return results[0] if len(results) == 1 and not self.force_tuple_output else results, log_det

    def _call(self, node: stock.Node, inputs: tuple[Tensor, ...], context: tuple[Tensor, ...], rev: bool,
              jac: bool) -> tuple[Sequence[Tensor], Tensor]:
        try:
            result = node.module(inputs, **({"c": context} if context else {}), rev=rev, jac=jac)
        except Exception as error:
            raise RuntimeError(f"{node}: {error}") from error
        return self._check_output(node, result, jac, rev)


class ReversibleGraphNet(stock.ReversibleGraphNet, GraphINN):
    """The older name of :class:`GraphINN`."""
