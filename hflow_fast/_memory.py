"""How much memory the activations of a model take in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

__all__ = ["SavedBytes", "peak_bytes"]


class SavedBytes(saved_tensors_hooks):
    """Within it, counts what graphs keep for the backward pass, each storage once, parameters left out.

    Example:
        >>> x = torch.ones(256, requires_grad=True)
        >>> with SavedBytes() as saved:
        ...     y = (2 * x).exp()
        >>> saved.total
        1024
    """

    def __init__(self) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        # The storages themselves, so that no later one takes the address of another.
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not (base.is_leaf and base.requires_grad):
            storage = tensor.untyped_storage()
            self._storages.setdefault(storage.data_ptr(), storage)
        return tensor


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most that is allocated at a time while ``function`` runs, beyond what was before.

    On a CPU as PyTorch's allocator reports it, libraries' own buffers left out.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = trace.profiler.kineto_results.events()
    now = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += change
        peak = max(peak, now)
    return peak
