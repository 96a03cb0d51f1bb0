"""Work whose launches are recorded once and replayed: on a GPU, as CUDA graphs.

The work is a generator function. What it does between two ``yield``s, a leg, is recorded; what it yields is called on
the host, between the legs, each time: to seed the noise anew, to exchange gradients with other processes. So a random
number generator has the state in each leg that it would have without a recording: a graph takes one seed per replay,
and here a leg is a graph. One training step is then as many launches as it has passes, and one or two more.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Callable, Generator, Generic, Hashable, Iterable, Iterator, Protocol, Sequence, TypeVar

import torch
from torch import Tensor

__all__ = ["Leg", "Recorder", "Replay", "cuda_recorder"]

T = TypeVar("T")
Work = Generator[Callable[[], object], None, T]

WARM_UP = 3  # times the work is done before it is recorded: libraries choose algorithms, optimizers make their state
_LOGGER = logging.getLogger(__name__)


class Leg(Protocol):
    """What was launched in one leg."""

    def replay(self) -> None:
        """Launches it again, on the same memory."""


Recorder = Callable[[], AbstractContextManager[Leg]]
"""A block in which work is recorded and not done. Memory of later blocks of one recorder may be that of earlier ones,
as they are replayed in this order; tensors that are still referred to keep theirs."""


def cuda_recorder(generators: Iterable[torch.Generator] = ()) -> Recorder:
    """Records CUDA graphs that share one pool of memory.

    Args:
        generators: which the work draws from, beside the device's own: a replay draws from their state at that time.
    """
    pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def record() -> Iterator[Leg]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Other threads, as NCCL's, go on asking the device whether it has finished, which this mode allows.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield graph

    return record


class Replay(Generic[T]):
    """Does the same work again and again, from its recording as soon as there is one.

    The work is done as it stands the first few times, then recorded, then replayed. A new key, or new shapes of the
    inputs, start this over. If it cannot be recorded, it is done as it stands from then on, and a warning says why.

    Args:
        new_recorder: makes the recorder of one recording; None: nothing is recorded.
        required: raise where recording fails.
        name: of the work, for the warning.
    """

    def __init__(self, new_recorder: Callable[[], Recorder] | None, *, name: str, required: bool = False) -> None:
        self._new_recorder = new_recorder
        self._name = name
        self._required = required
        self._key: Hashable = None
        self._times = 0
        self._recording: _Recording[T] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether the next call with the same key is a replay."""
        return self._recording is not None

    def run(self, work: Callable[[Sequence[Tensor]], Work[T]], inputs: Sequence[Tensor], key: Hashable,
            changed: Callable[[], Iterable[Tensor]] = tuple) -> T:
        """One time the work, whose results a later call may overwrite.

        Args:
            work: given the inputs, or copies that keep their place, it yields what the host does between its legs and
                returns tensors. Everything else that its launches depend on is in ``key``.
            inputs: tensors whose values change from call to call.
            key: of the recording, beside shapes and dtypes of ``inputs``.
            changed: tensors that the work changes in place. A replay does not count as a change by itself, and whoever
                caches what depends on them would not notice.

        Raises:
            RuntimeError: it cannot be recorded, and that is required.
        """
        if self._new_recorder is None:
            return _do(work(inputs))
        key = key, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key != self._key:
            self.forget()
            self._key = key
        if self._recording is None:
            self._times += 1
            if self._times <= WARM_UP or not self._record(work, inputs):
                return _do(work(inputs))
        torch._foreach_copy_(self._recording.inputs, list(inputs))
        result = self._recording.replay()
        torch.autograd.graph.increment_version(list(changed()))
        return result

    def forget(self) -> None:
        """Gives the recording's memory back; the next calls start over."""
        self._recording, self._times, self._key = None, 0, None

    def _record(self, work: Callable[[Sequence[Tensor]], Work[T]], inputs: Sequence[Tensor]) -> bool:
        try:
            self._recording = _Recording(self._new_recorder(), work, [tensor.clone() for tensor in inputs])
        except RuntimeError as error:
            if self._required:
                raise
            self._new_recorder = None
            self.forget()
            _LOGGER.warning("%s: no CUDA graph, so each launch costs the host its time: %s", self._name, _cause(error))
            return False
        return True


class _Recording(Generic[T]):
    def __init__(self, record: Recorder, work: Callable[[Sequence[Tensor]], Work[T]], inputs: list[Tensor]) -> None:
        self.inputs = inputs
        self._legs: list[tuple[Leg, Callable[[], object] | None]] = []
        steps = work(inputs)
        between: Callable[[], object] | None
        try:
            while True:
                with record() as leg:
                    try:
                        between = next(steps)
                    except StopIteration as end:
                        between, self._result = None, end.value
                self._legs.append((leg, between))
                if between is None:
                    break
        finally:
            steps.close()  # after an error, what the work has set up is taken down

    def replay(self) -> T:
        for leg, between in self._legs:
            leg.replay()
            if between is not None:
                between()
        return self._result


def _do(work: Work[T]) -> T:
    try:
        while True:
            next(work)()
    except StopIteration as end:
        return end.value


def _cause(error: BaseException) -> str:
    """The first of a chain of errors: a capture that fails ends with more errors, which say less."""
    while error.__context__ is not None and not isinstance(error.__context__, StopIteration):
        error = error.__context__
    lines: list[Any] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"
