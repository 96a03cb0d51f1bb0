"""One session of training: the loop around :meth:`Trainer.step`."""

from __future__ import annotations

import math
import signal
import sys
import time
from typing import Callable

import torch
from tqdm import tqdm

from ..data import dequantize
from ..errors import CheckpointError
from ..inference import draw_samples, image_grid, reconstruct, save_png
from .evaluation import evaluation_indices, held_out_bits_per_dim
from .log import RunLog
from .optimizer import learning_rates
from .progress import Limits, ProgressBar, StopRequest, stop_on_signals
from .trainer import StepResult, Trainer

__all__ = ["Session", "TrainingError"]

_LOG_SECONDS = 5.0  # reading the loss waits for the device, so it is done this often and not at every step
_RETRY_SECONDS = 300.0  # until a failed save is tried again
_SKIPPED_IN_A_ROW = 20
_GRID = 8  # images per row of the grids


class TrainingError(ArithmeticError):
    """Training cannot go on: the loss is not finite any more."""


class Session:
    """Trains until a limit is reached, with logs, evaluations and checkpoints at the configured intervals.

    Args:
        trainer: what to train; its run directory gets everything that is written. Where several processes train
            together, each runs a session, and only the one of rank 0 writes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._is_writer = trainer.ranks.is_writer
        self._limits = Limits.from_config(trainer.config.general, trainer.steps_per_epoch)
        self._offset = trainer.seconds - time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether the run has reached one of its limits."""
        return self._limits.reached(self._trainer.step_count, self._trainer.seconds)

    def run(self) -> str:
        """Trains until a limit is reached or SIGINT or SIGTERM asks for an end; then saves.

        Returns:
            Why it ended: "finished", or the name of the signal.

        Raises:
            TrainingError: 20 steps in a row were not finite; the last checkpoint is kept.
            CheckpointError: the checkpoint at the end could not be written; the previous one is kept.
            RankError: another process has ended, or they have come to differ.
        """
        trainer = self._trainer
        log = None
        if self._is_writer:
            trainer.run.make_folders()
            log = RunLog(trainer.run, trainer.step_count)
        bar = ProgressBar(self._limits, trainer.step_count, trainer.seconds, shown=self._is_writer)
        try:
            with stop_on_signals() as stop:
                stopped = self._loop(log, bar, stop)
                if not stopped:
                    self._evaluate(log)
                self._tick()
                trainer.save()
        finally:
            bar.close()
            if log is not None:
                log.close()
        if not stopped:
            return "finished"
        return stop.signal.name if stop.signal is not None else signal.SIGTERM.name

    def _loop(self, log: RunLog | None, bar: ProgressBar, stop: StopRequest) -> bool:
        """Takes steps; returns whether a signal, to this or another process, ended it before its limit."""
        trainer, output = self._trainer, self._trainer.config.output
        window = _Window(trainer.device)
        trainer.initialize()
        if trainer.step_count == 0:
            self._save()  # a disk that cannot take a checkpoint is better known now than hours later
        evaluation = _Timer(output.visualization_every * 3600.0)
        checkpoint = _Timer(output.checkpoint_every * 3600.0)
        logging = _Timer(_LOG_SECONDS)
        finished = self._agree(self.finished)
        stopped = self._agree(stop.signal is not None)
        while not (finished or stopped):
            window.add(trainer.step())
            self._tick()
            timers_due = logging.due() or evaluation.due() or checkpoint.due()
            if self._agree(timers_due or self.finished or stop.signal is not None):  # one exchange in most steps
                finished, stopped = self._agree(self.finished), self._agree(stop.signal is not None)
                if self._agree(logging.due()):
                    self._log(log, window)
                    logging.restart()
                if self._agree(evaluation.due()) and not finished:
                    self._evaluate(log)
                    evaluation.restart()
                    window.restart_clock()
                if self._agree(checkpoint.due()) and not finished:
                    checkpoint.restart(None if self._save() else _RETRY_SECONDS)
            bar.update(trainer.step_count, trainer.epoch, trainer.seconds, window.text)
        if window.steps:
            self._log(log, window)
        return stopped and not finished

    def _agree(self, flag: bool) -> bool:
        """Whether any process says so. Clocks and signals differ between processes, and all have to do the same.

        At every step, then: the flag goes from CPU to CPU (about a tenth of a millisecond on one machine) and does not
        wait for the device, which stays busy with what is queued.
        """
        return self._trainer.ranks.any(flag)

    def _tick(self) -> None:
        self._trainer.seconds = self._offset + time.monotonic()

    def _save(self) -> bool:
        try:
            self._trainer.save()
        except CheckpointError as error:
            _warn(f"{error} Training goes on, and saving is tried again.")
            return False
        return True

    def _log(self, log: RunLog | None, window: _Window) -> None:
        trainer = self._trainer
        general = trainer.config.general
        epoch = (trainer.step_count - 1) // trainer.steps_per_epoch  # of the step that was just taken
        values = {"epoch": epoch, "images": trainer.step_count * general.samples_per_grad_eval,
                  "seconds": round(trainer.seconds, 3)}
        values |= window.read(general.samples_per_grad_eval)
        values |= {f"learning_rate/{role}": rate for role, rate in learning_rates(epoch, general).items()}
        if log is not None:
            _attempt(lambda: log.write(trainer.step_count, values), "the metrics could not be written")
        if window.skipped_in_a_row >= _SKIPPED_IN_A_ROW:
            trainer.ranks.fail(TrainingError(
                f"{trainer.run.path}: the loss or its gradient was not finite in {window.skipped_in_a_row} steps in a "
                f"row, up to step {trainer.step_count}; lower the learning rates, or check the data. "
                "The last checkpoint is as it was."))

    def _evaluate(self, log: RunLog | None) -> None:
        """Held-out bits/dim, by all processes together, and grids of the averaged model."""
        trainer, general, output = self._trainer, self._trainer.config.general, self._trainer.config.output
        model, held_out, run = trainer.average, trainer.dataset.held_out, trainer.run
        indices = evaluation_indices(len(held_out), output.evaluation_images)
        values = held_out_bits_per_dim(model, held_out, indices, batch_size=general.batch_size,
                                       bits=general.discretization_bits, ranks=trainer.ranks)
        if log is None:
            return
        samples = draw_samples(model, 4 * _GRID, std=output.sample_base_sigma, seed=general.seed)
        images = held_out[indices[:_GRID]].to(trainer.device)
        reconstructions = reconstruct(model, dequantize(images, bits=general.discretization_bits))
        name = f"step_{trainer.step_count:08d}.png"
        grids = {run.samples / name: samples, run.reconstructions / name: reconstructions}
        for path, grid in grids.items():
            _attempt(lambda: save_png(image_grid(grid, min(_GRID, len(images))), path), f"{path} could not be written")
        _attempt(lambda: log.write(trainer.step_count, values), "the metrics could not be written")
        tqdm.write(f"step {trainer.step_count}: held-out {values['held_out_bits_per_dim']:.3f} bits/dim")


class _Window:
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


class _Timer:
    """Says when an interval, in seconds, has passed."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self.restart()

    def due(self) -> bool:
        return time.monotonic() >= self._end

    def restart(self, interval: float | None = None) -> None:
        """Starts the interval anew, shortened to ``interval`` where that is given."""
        self._end = time.monotonic() + min(self._interval, self._interval if interval is None else interval)


def _attempt(write: Callable[[], None], failure: str) -> None:
    try:
        write()
    except OSError as error:
        _warn(f"{failure} ({error}); training goes on.")


def _warn(text: str) -> None:
    tqdm.write(f"WARNING: {text}", file=sys.stderr)
