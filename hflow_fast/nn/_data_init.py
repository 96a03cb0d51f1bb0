"""Data-dependent initialisation: remembering that it happened, and the statistics it takes."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Iterator

import torch
from torch import Tensor, nn

__all__ = ["DataInitialized", "channel_statistics", "initialize_locally"]

_SMALLEST_STD = 1e-6

_local: ContextVar[bool] = ContextVar("initialize_locally", default=False)


@contextmanager
def initialize_locally() -> Iterator[None]:
    """Within it, data-dependent initialisation looks at the data of this process alone.

    Where a process group is set up, layers initialise from the data of all its ranks, and every rank has to take part:
    one that initialises alone would wait for the others. That is what ``DistributedDataParallel`` and loops like it
    do, as every rank makes the first pass. When just some ranks do, let one initialise within this, then give its
    parameters and buffers to the others.
    """
    token = _local.set(True)
    try:
        yield
    finally:
        _local.reset(token)


class DataInitialized(nn.Module):
    """A module that initialises itself from data once; that it did is saved and loaded with its state.

    Args:
        data_init: False counts as initialised from the start.
    """

    initialized: Tensor

    def __init__(self, data_init: bool) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.tensor(not data_init))
        self._known_initialized = not data_init

    @property
    def is_initialized(self) -> bool:
        """Whether the data-dependent initialisation has happened; once it has, asking costs no device sync."""
        if not self._known_initialized:
            self._known_initialized = bool(self.initialized)
        return self._known_initialized

    @torch.no_grad()
    def finish_initialization(self) -> None:
        """Data will not initialise this module any more."""
        self.initialized.fill_(True)
        self._known_initialized = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Asked now, torch.compile need not ask a tensor in the middle of a graph.
        self._known_initialized = not self.initialized.is_meta and bool(self.initialized)


@torch.no_grad()
def channel_statistics(x: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the standard deviation of each channel, over all ranks of a process group.

    All of them have to call it; within :func:`initialize_locally` the other ranks are left out.

    Args:
        x: (B, C, …).
        correction: 1: unbiased; 0: of the values themselves.

    Returns:
        (C,) each, float64.

    Raises:
        ValueError: a channel has fewer than two values to take a standard deviation of.
    """
    values = x.detach().double().transpose(0, 1).flatten(1)
    count = values.new_full(values.shape[:1], values.shape[1])
    moments = torch.stack([count, values.sum(dim=1), values.square().sum(dim=1)])
    if not _local.get() and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(moments)
    count, total, squares = moments
    if count[0] < 2:
        raise ValueError(f"ActNorm: x of shape {tuple(x.shape)} has fewer than two values per channel to initialise "
                         "from; give a larger first batch, or use data_init=False.")
    variance = (squares - total.square() / count) / (count - correction)
    return total / count, variance.clamp_min(_SMALLEST_STD**2).log() / 2
