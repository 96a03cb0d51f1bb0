"""Several processes that train together, started by ``torchrun``: which one this is, and what they exchange.

The trainer does not wrap its model in ``DistributedDataParallel``: gradients are added up once per optimizer step, in a
few flat buckets, whatever the number of passes in it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Hashable, Iterator, Mapping, NoReturn, Sequence, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["RankError", "Ranks", "fingerprints", "own_device", "process_group"]

T = TypeVar("T")

# A process that died is noticed at once. This is for one that hangs, and has to be longer than the work that rank 0 does
# alone while the others wait, such as an FID of 30,000 samples.
_TIMEOUT = timedelta(hours=2)
_BUCKET = 64 * 2**20  # bytes; large enough for the full speed of a network, small beside the gradients


class RankError(ConnectionError):
    """The processes of a run do not go on together: one of them has ended, or they have come to differ."""


class Ranks:
    """The processes that train together, and this one's place among them.

    Every method that exchanges something has to be called by all of them, in the same order. With one process nothing
    is exchanged, and everything works without a process group.

    Args:
        rank: of this process, from 0. Rank 0 is the one that writes.
        count: of the processes.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` pieces of work are this process's."""
        return range(self.rank, count, self.count)

    def any(self, flag: bool) -> bool:
        """Whether any process says so.

        It waits for the other processes but not for the device: the flag goes from CPU to CPU.
        """
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag), dtype=torch.int32)
        with _exchange():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, in the order of their ranks: anything that pickles."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _exchange():
            dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, with the same bits everywhere.

        They travel in flat buckets: a few large exchanges instead of one for each tensor.

        Args:
            tensors: on one device, of the same shapes and dtypes in every process.
        """
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _exchange():
                dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket)])

    @torch.no_grad()
    def broadcast(self, module: nn.Module) -> None:
        """Gives every process the parameters and buffers of rank 0."""
        if self.count == 1:
            return
        for tensor in [*module.parameters(), *module.buffers()]:
            received = tensor.detach().clone(memory_format=torch.contiguous_format)
            with _exchange():
                dist.broadcast(received.view(torch.uint8) if received.dtype == torch.bool else received, src=0)
            tensor.copy_(received)  # unlike the exchange, this counts as a change: caches of parameters notice

    def check_equal(self, facts: Mapping[str, Hashable]) -> None:
        """Whether all processes have the same ``facts``.

        Raises:
            RankError: they differ; the text names which.
        """
        first, *others = self.gather(dict(facts))
        for rank, other in enumerate(others, start=1):
            differing = [name for name in first if first[name] != other.get(name)]
            if differing:
                names = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
                self.fail(RankError(f"process {rank} and process 0 differ in {names}; training was stopped before it "
                                    "could be spoiled. Resume from the last checkpoint, with the same version of "
                                    "everything and the same files on all machines."))

    def fail(self, error: BaseException) -> NoReturn:
        """Ends with an error that all processes have come to: rank 0 raises it, the others end without a word."""
        if self.is_writer:
            raise error
        self._end_after_another()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A piece of work without exchanges that all processes finish, or none: an error of one ends all.

        The first process that failed raises its error; the others end without a word.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = [rank for rank, has_failed in enumerate(self.gather(failure is not None)) if has_failed]
        if failed and failed[0] == self.rank:
            raise failure
        if failed:
            self._end_after_another()

    def _end_after_another(self) -> NoReturn:
        """Ends once the process that has the error to tell has left: torchrun kills the others when the first ends."""
        with suppress(RankError):
            self.any(False)  # that process does not answer any more
        raise SystemExit(2)


@contextmanager
def process_group(device: torch.device | str) -> Iterator[Ranks]:
    """The processes that ``torchrun`` has started, connected; one process alone where it was not used.

    Tensors on GPUs are exchanged by NCCL, those on CPUs by gloo.

    Args:
        device: of this process; see :func:`own_device`.

    Raises:
        ConfigError: the environment says that there are several, but not where.
        RankError: the processes cannot be connected.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    backend = "gloo"
    wanted = torch.device(device)
    if wanted.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        if wanted.index is not None:
            torch.cuda.set_device(wanted)
    try:
        with _exchange():
            dist.init_process_group(backend, timeout=_TIMEOUT)
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE is {count}, but the processes cannot be connected ({error}); start them with "
                          "torchrun, or unset WORLD_SIZE for one process alone.") from error
    try:
        yield Ranks(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """The device of this process where ``device`` was asked for.

    Each process of a machine takes a GPU of its own, by its ``LOCAL_RANK``; where each sees only one (as under Slurm
    with ``--gpus-per-task``), that one.

    Args:
        device: "cpu", "cuda", "cuda:1" …

    Raises:
        ConfigError: there are fewer GPUs than processes, or one GPU is named for several processes.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted = torch.device(device)
    if processes == 1 or wanted.type != "cuda":
        return device
    gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if wanted.index not in (None, local_rank):
        raise ConfigError(f"--device {device} is one GPU, but {processes} processes run on this machine; "
                          "give --device cuda, and each takes a GPU of its own.")
    if gpus == 1:
        return "cuda:0"
    if local_rank >= gpus:
        raise ConfigError(f"{processes} processes, but {gpus} GPUs on this machine; "
                          f"give torchrun --nproc-per-node {gpus}.")
    return f"cuda:{local_rank}"


@torch.no_grad()
def fingerprints(module: nn.Module) -> dict[str, int]:
    """A number for each parameter and buffer that tells apart any two values, for :meth:`Ranks.check_equal`."""
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.numel()}
    hashes = torch.stack([torch.hash_tensor(tensor.detach()).view(torch.int64) for tensor in state.values()])
    return dict(zip(state, hashes.tolist()))


@contextmanager
def _exchange() -> Iterator[None]:
    """Turns what the backends raise when a process is gone into one sentence."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError is one, and gloo raises plain ones
        rank = os.environ.get("RANK", "?")
        reason = str(error).strip().splitlines()[-1]
        raise RankError(f"process {rank}: the connection to another process of this run was lost, mostly because that "
                        f"one has ended; its own message says why ({reason[:200]}).") from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, by dtype, in groups of at most ``_BUCKET`` bytes or one tensor."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for group in by_dtype.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in group:
            if bucket and size + tensor.nbytes > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        if bucket:
            yield bucket
