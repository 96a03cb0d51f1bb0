"""Drawing the same random numbers twice."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch

__all__ = ["RandomState"]


class RandomState:
    """The state of the generators that code on ``device`` draws from, as it is now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = self._now()

    def has_changed(self) -> bool:
        """Whether anything was drawn since."""
        return any(not torch.equal(now, before) for now, before in zip(self._now(), self._states))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it, the numbers that followed this state come again; afterwards everything goes on as if without."""
        on_gpu = self._device.type == "cuda"
        with torch.random.fork_rng([self._device] if on_gpu else []):
            torch.set_rng_state(self._states[0])
            if on_gpu:
                torch.cuda.set_rng_state(self._states[1], self._device)
            yield

    def _now(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states
