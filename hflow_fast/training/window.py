"""Loss and speed between two records of the log."""

from __future__ import annotations

import math
import time

import torch

from .trainer import StepResult

__all__ = ["Window"]


class Window:
    """Loss and speed since the last record, kept on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.text = "loss –"
        self.skipped_in_a_row = 0
        self._rate = 0.0
        self._row = torch.zeros((), device=device)
        self._restart()

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self._timed_steps += 1
        self._loss += torch.where(result.skipped, 0.0, result.loss)
        self._skipped += result.skipped
        self._row = torch.where(result.skipped, self._row + 1, 0.0)
        self._norm = result.gradient_norm

    def read(self, images_per_step: int) -> dict[str, float]:
        loss, skipped, row, norm = torch.stack([self._loss, self._skipped, self._row, self._norm]).tolist()
        self.skipped_in_a_row = int(row)
        values: dict[str, float] = {"skipped_steps": int(skipped)}
        if self._timed_steps:
            self._rate = self._timed_steps * images_per_step / (time.monotonic() - self._start)
            values["images_per_second"] = self._rate
        if skipped < self.steps:
            values["loss"] = loss / (self.steps - skipped)
        if math.isfinite(norm):
            values["gradient_norm"] = norm
        self.text = f"{self._rate:.1f} images/s, loss {values.get('loss', math.nan):.4f}"
        self._restart()
        return values

    def restart_clock(self) -> None:
        """Leaves what has happened since the last record out of its speed."""
        self._timed_steps = 0
        self._start = time.monotonic()

    def _restart(self) -> None:
        self.steps = 0
        self.restart_clock()
        self._loss = torch.zeros_like(self._row)
        self._skipped = torch.zeros_like(self._row)
