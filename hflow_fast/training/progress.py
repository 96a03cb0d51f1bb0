"""When a session ends, and how far it is."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Iterator

from tqdm import tqdm

from .config import GeneralConfig

__all__ = ["Limits", "ProgressBar", "StopRequest", "stop_on_signals"]


@dataclass(frozen=True)
class Limits:
    """Ends of a run, counted over all its sessions; the first one reached counts.

    Args:
        steps: optimizer steps.
        seconds: training time.
    """

    steps: int | None
    seconds: float | None

    @classmethod
    def from_config(cls, config: GeneralConfig, steps_per_epoch: int) -> Limits:
        steps = [config.steps] if config.steps is not None else []
        if config.epochs is not None:
            steps.append(config.epochs * steps_per_epoch)
        return cls(min(steps, default=None), None if config.hours is None else config.hours * 3600.0)

    def reached(self, step: int, seconds: float) -> bool:
        return (self.steps is not None and step >= self.steps) or (self.seconds is not None and seconds >= self.seconds)

    def fraction(self, step: int, seconds: float) -> float:
        """The part of the run that is done, in [0, 1]."""
        parts = [step / self.steps] if self.steps is not None else []
        if self.seconds is not None:
            parts.append(seconds / self.seconds)
        return min(max(parts), 1.0)

    def seconds_left(self, step: int, seconds: float, seconds_per_step: float) -> float:
        left = [(self.steps - step) * seconds_per_step] if self.steps is not None else []
        if self.seconds is not None:
            left.append(self.seconds - seconds)
        return max(min(left), 0.0)


class ProgressBar:
    """A bar over the whole run with the session's speed and the time left; silent where stderr is no terminal."""

    def __init__(self, limits: Limits, step: int, seconds: float, *, shown: bool = True) -> None:
        self._limits = limits
        self._first_step = step
        self._start = time.monotonic()
        self._bar = tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar}| {desc}", disable=None if shown else True)
        self._move(step, seconds)

    def update(self, step: int, epoch: int, seconds: float, text: str) -> None:
        per_step = (time.monotonic() - self._start) / max(step - self._first_step, 1)
        left = timedelta(seconds=round(self._limits.seconds_left(step, seconds, per_step)))
        self._bar.set_description_str(f"step {step}, epoch {epoch}, {text}, {left} left", refresh=False)
        self._move(step, seconds)

    def close(self) -> None:
        self._bar.close()

    def _move(self, step: int, seconds: float) -> None:
        self._bar.update(self._limits.fraction(step, seconds) - self._bar.n)


@dataclass
class StopRequest:
    """Set by a signal; read by the training loop after each step."""

    signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it, SIGINT (Ctrl-C) and SIGTERM ask for an orderly end. A second one acts as it would without."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        request.signal = signal.Signals(number)
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
