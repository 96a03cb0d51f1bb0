"""The order in which training visits the images."""

from __future__ import annotations

from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import DatasetError

__all__ = ["Batches"]


class Batches(Iterator[Tensor]):
    """Endless batches of shuffled image indices.

    Every epoch is a new permutation that depends only on the seed and the epoch's number; images that do not fill a
    last batch are left out of that epoch. A copy that loads the state goes on with exactly the same batches.

    Args:
        count: number of images.
        batch_size: images per batch, 1 to ``count``.
        seed: at least 0.

    Yields:
        (batch_size,), int64, on the CPU.

    Raises:
        DatasetError: fewer images than one batch needs.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int = 0) -> None:
        if not 1 <= batch_size <= count:
            raise DatasetError(f"a batch of {batch_size} cannot be drawn from {count} training images; "
                               "choose a batch size from 1 to that number.")
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._start_epoch(0)

    def __next__(self) -> Tensor:
        if self.position + self._batch_size > self._count:
            self._start_epoch(self.epoch + 1)
        start = self.position
        self.position += self._batch_size
        return self._order[start : self.position].clone()

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        """Of the batch returned last, from 0."""
        self.position = 0
        """Images of this epoch returned so far."""
        self._order = torch.from_numpy(np.random.default_rng((self._seed, epoch)).permutation(self._count))

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator stands."""
        return {"count": self._count, "seed": self._seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another iterator stood, with its seed. The batch size may be another.

        Raises:
            DatasetError: the state belongs to another number of images.
        """
        if state["count"] != self._count:
            raise DatasetError(f"the order of {state['count']} images cannot go on with {self._count}; "
                               "give the dataset that training began with.")
        self._seed = state["seed"]
        self._start_epoch(state["epoch"])
        self.position = state["position"]
