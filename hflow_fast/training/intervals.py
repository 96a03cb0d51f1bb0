"""Intervals in steps or in hours, which go on where an earlier session of the run left them."""

from __future__ import annotations

from typing import Any, Mapping

from .config import OutputConfig

__all__ = ["INTERVALS", "Interval"]

INTERVALS = ("checkpoint", "visualization", "metrics")


class Interval:
    """Says when something is due again.

    Args:
        steps: optimizer steps between two times: it is due at the multiples of this number.
        seconds: training seconds between them, where ``steps`` is None.
    """

    def __init__(self, steps: int | None, seconds: float) -> None:
        self._steps = steps
        self._seconds = seconds
        self.restart(0, 0.0)

    @classmethod
    def from_config(cls, name: str, config: OutputConfig) -> Interval:
        """The interval NAME_EVERY_STEPS or NAME_EVERY, which is in hours."""
        return cls(getattr(config, f"{name}_every_steps"), getattr(config, f"{name}_every") * 3600.0)

    def due(self, step: int, seconds: float) -> bool:
        """Whether it is time, at a step of the run and after so many seconds of training."""
        if self._steps is not None:
            return step // self._steps > self._last_step // self._steps
        return seconds >= self._last_seconds + self._seconds

    def restart(self, step: int, seconds: float) -> None:
        self._last_step, self._last_seconds = step, seconds

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._last_step, "seconds": self._last_seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.restart(state["step"], state["seconds"])
