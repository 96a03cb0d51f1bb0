"""Runs a function in several processes of one process group."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any, Callable

import torch.distributed as dist

from hflow_fast.training import Ranks, process_group

# One process imports everything and is copied, which is far faster than starting Python anew each time; it is not
# this one, because autograd's threads do not survive being copied.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["hflow_fast.models", "hflow_fast.training", "torch._dynamo",
                                 "torch.utils.tensorboard"])


class Failure(AssertionError):
    """A process raised something, or ended without a result."""


def in_processes(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """``function(ranks, *arguments)`` in ``count`` processes, which is defined at the top of a module.

    Returns:
        The results in the order of the ranks. In place of one there is the exit code of a process that was killed.

    Raises:
        Failure: a process raised an exception, or is not done after ``timeout`` seconds.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(count):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_work, args=(rank, count, store.port, sender, function, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return [_receive(pipe, process, timeout) for pipe, process in zip(pipes, processes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(rank: int, count: int, port: int, sender: Connection, function: Callable[..., Any], arguments: Any) -> None:
    # As torchrun does it: the store is served by the parent.
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
                       "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                       "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"})
    try:
        with process_group("cpu") as ranks:
            answer = True, function(ranks, *arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    sender.send_bytes(pickle.dumps(answer))  # by value: a pipe's own pickles leave tensors in this process's memory


def _receive(pipe: Connection, process: Any, timeout: float) -> Any:
    if not wait([pipe], timeout):
        raise Failure(f"not done after {timeout} seconds")
    try:
        succeeded, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        return process.exitcode
    if not succeeded:
        raise Failure(result)
    return result
