"""CUDA graphs without CUDA: what torch dispatches is recorded and done again, on the same memory and without Python."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Tape", "tape_recorder"]


class Tape(TorchDispatchMode):
    """One leg's operations. :meth:`replay` writes each result where the recorded one was, as a graph would."""

    def __init__(self, begin: Callable[[], None], unnoticed: list[Tensor]) -> None:
        super().__init__()
        self._begin = begin
        self._unnoticed = unnoticed
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tree_map(lambda value: value, (args, kwargs or {}))  # lists as they are now
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, *given, tree_map(lambda value: value, result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self._begin()
        # A graph changes tensors without their version's knowing.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self._unnoticed)):
            for function, args, kwargs, recorded in self._calls:
                for new, old in zip(tree_leaves(function(*args, **kwargs)), tree_leaves(recorded), strict=True):
                    if isinstance(old, Tensor) and new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                        old.copy_(new)


def tape_recorder(kept: Callable[[], Iterable[Tensor]]) -> Callable[[], Any]:
    """A ``new_recorder`` of :class:`hflow_fast._replay.Replay`.

    Recording does the work, on a CPU; so the first replay begins by giving the tensors ``kept`` their old values.
    """

    def new_recorder() -> Callable[[], Any]:
        before = [(tensor, tensor.detach().clone()) for tensor in kept()]

        @torch.no_grad()
        def begin() -> None:
            for tensor, value in before:
                tensor.copy_(value)
            before.clear()

        @contextmanager
        def record() -> Iterator[Tape]:
            tape = Tape(begin, list(kept()))
            with tape:
                yield tape

        return record

    return new_recorder
