"""One session of training: the loop around :meth:`Trainer.step`."""

from __future__ import annotations

import logging
import math
import signal
import time
from typing import Any, Callable

from torch import Tensor

from ..errors import CheckpointError, DatasetError
from ..inference import save_png
from .checkpoint import read_checkpoint
from .evaluation import evaluation_indices, held_out_bits_per_dim
from .fid import load_extractor, measure_fid
from .intervals import INTERVALS, Interval
from .journal import describe_session, journal
from .log import RunLog
from .pictures import reconstruction_grid, sample_grid
from .progress import Limits, ProgressBar, StopRequest, stop_on_signals
from .trainer import Trainer
from .window import Window

__all__ = ["Session", "TrainingError"]

_LOG_SECONDS = 5.0  # reading the loss waits for the device, so it is done this often and not at every step
_RETRY_SECONDS = 300.0  # until a failed save is tried again
_SKIPPED_IN_A_ROW = 20
_BEST_BY = "held_out_bits_per_dim"
_LOGGER = logging.getLogger(__name__)


class TrainingError(ArithmeticError):
    """Training cannot go on: the loss is not finite any more."""


class Session:
    """Trains until a limit is reached, with logs, evaluations and checkpoints at the configured intervals.

    Args:
        trainer: what to train; its run directory gets everything that is written. Where several processes train
            together, each runs a session, and only the one of rank 0 writes.

    Raises:
        ConfigError, CheckpointError: the configuration asks for FIDs that cannot be measured.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._is_writer = trainer.ranks.is_writer
        self._limits = Limits.from_config(trainer.config.general, trainer.steps_per_epoch)
        self._offset = trainer.seconds - time.monotonic()
        self._intervals = {name: Interval.from_config(name, trainer.config.output) for name in INTERVALS}
        for name, state in trainer.session_state.get("intervals", {}).items():
            self._intervals[name].load_state_dict(state)
        self._retry_at = math.inf  # training seconds at which a failed save is tried again
        self._extractor = None
        if self._is_writer:
            self._extractor = load_extractor(trainer.config, trainer.dataset.resolution, trainer.device)
        self._best = math.inf  # held-out bits/dim
        self._measured: dict[str, Any] = dict(trainer.notes)  # notes of the step at which they were taken

    @property
    def finished(self) -> bool:
        """Whether the run has reached one of its limits."""
        return self._limits.reached(self._trainer.step_count, self._trainer.seconds)

    def run(self) -> str:
        """Trains until a limit is reached or SIGINT or SIGTERM asks for an end; then saves.

        Returns:
            Why it ended: "finished", or the name of the signal.

        Raises:
            TrainingError: 20 steps in a row were not finite; the text names the layer and the last good checkpoint.
            CheckpointError: the checkpoint at the end could not be written; the previous one is kept.
            RankError: another process has ended, or they have come to differ.
        """
        trainer = self._trainer
        with journal(trainer.run.journal if self._is_writer else None):
            self._log_start()
            try:
                ended = self._run()
            except BaseException as error:
                _LOGGER.error("ended at step %d by %s: %s", trainer.step_count, type(error).__name__, error)
                raise
            _LOGGER.debug("%s at step %d, saved", ended, trainer.step_count)
        return ended

    def _run(self) -> str:
        trainer = self._trainer
        log = None
        if self._is_writer:
            trainer.run.make_folders()
            log = RunLog(trainer.run, trainer.step_count)
            self._find_best()
        bar = ProgressBar(self._limits, trainer.step_count, trainer.seconds, shown=self._is_writer)
        try:
            with stop_on_signals() as stop:
                stopped = self._loop(log, bar, stop)
                if not stopped:
                    self._evaluate(log, grids=True, metrics=True)
                self._tick()
                self._write_checkpoint()
        finally:
            bar.close()
            if log is not None:
                log.close()
        if not stopped:
            return "finished"
        return stop.signal.name if stop.signal is not None else signal.SIGTERM.name

    def _loop(self, log: RunLog | None, bar: ProgressBar, stop: StopRequest) -> bool:
        """Takes steps; returns whether a signal, to this or another process, ended it before its limit."""
        trainer = self._trainer
        window = Window(trainer.device)
        trainer.initialize()
        if trainer.resumed_from is None:
            self._save()  # a disk that cannot take a checkpoint is better known now than hours later
        next_log = time.monotonic() + _LOG_SECONDS
        finished = self._agree(self.finished)
        stopped = self._agree(stop.signal is not None)
        while not (finished or stopped):
            window.add(trainer.step())
            self._tick()
            log_due = time.monotonic() >= next_log
            if self._agree(log_due or self.finished or stop.signal is not None or self._something_due()):
                # Several processes exchange this one answer in most steps, and the details only where it is yes.
                finished, stopped = self._agree(self.finished), self._agree(stop.signal is not None)
                if self._agree(log_due):
                    self._log(log, window)
                    next_log = time.monotonic() + _LOG_SECONDS
                if not finished:
                    self._do_what_is_due(log, window)
            bar.update(trainer.step_count, trainer.epoch, trainer.seconds, window.text)
        if window.steps:
            self._log(log, window)
        return stopped and not finished

    def _do_what_is_due(self, log: RunLog | None, window: Window) -> None:
        due = {name: self._agree(self._due(name)) for name in INTERVALS}
        improved = False
        if due["visualization"] or due["metrics"]:
            improved = self._agree(self._evaluate(log, grids=due["visualization"], metrics=due["metrics"]))
            window.restart_clock()
        if due["checkpoint"] or improved:
            self._save()

    def _due(self, name: str) -> bool:
        step, seconds = self._trainer.step_count, self._trainer.seconds
        return self._intervals[name].due(step, seconds) or (name == "checkpoint" and seconds >= self._retry_at)

    def _restart(self, name: str) -> None:
        self._intervals[name].restart(self._trainer.step_count, self._trainer.seconds)

    def _something_due(self) -> bool:
        return any(map(self._due, INTERVALS))

    def _agree(self, flag: bool) -> bool:
        """Whether any process says so. Clocks and signals differ between processes, and all have to do the same.

        At every step, then: the flag goes from CPU to CPU (some tenths of a millisecond on one machine) and does not
        wait for the device, which stays busy with what is queued.
        """
        return self._trainer.ranks.any(flag)

    def _tick(self) -> None:
        self._trainer.seconds = self._offset + time.monotonic()

    def _save(self) -> None:
        """Writes a checkpoint; where that fails, training goes on, and it is tried again in a while."""
        self._retry_at = math.inf
        try:
            self._write_checkpoint()
        except CheckpointError as error:
            self._retry_at = self._trainer.seconds + _RETRY_SECONDS
            _LOGGER.warning("%s Training goes on, and saving is tried again in %g s.", error, _RETRY_SECONDS)

    def _write_checkpoint(self) -> None:
        trainer = self._trainer
        self._restart("checkpoint")
        trainer.session_state = {"intervals": {name: interval.state_dict()
                                               for name, interval in self._intervals.items()}}
        notes = self._measured if self._measured.get("step") == trainer.step_count else {}
        value = notes.get(_BEST_BY, math.inf)
        best = value < self._best
        trainer.save(notes, best=best)
        self._best = min(value, self._best)
        _LOGGER.debug("step %d: checkpoint saved%s", trainer.step_count, ", the best so far" if best else "")

    def _find_best(self) -> None:
        """The best value of the run's earlier sessions; ends what one that was killed in a save has left undone."""
        trainer = self._trainer
        try:
            if trainer.run.best.is_file():
                self._best = read_checkpoint(trainer.run.best).notes.get(_BEST_BY, math.inf)
        except CheckpointError as error:
            _LOGGER.warning("%s The best checkpoint is sought anew.", error)
        if trainer.resumed_from != trainer.run.checkpoint:
            return
        value = trainer.notes.get(_BEST_BY, math.inf)
        try:
            trainer.keep(best=value < self._best)
        except CheckpointError as error:
            _LOGGER.warning("%s", error)
        self._best = min(value, self._best)

    def _log_start(self) -> None:
        trainer = self._trainer
        if not self._is_writer:
            return
        _LOGGER.debug("%s", describe_session(trainer.device))
        if trainer.resumed_from is None:
            _LOGGER.debug("%s: training starts", trainer.run.path)
        else:
            _LOGGER.debug("%s: training goes on at step %d, from %s", trainer.run.path, trainer.step_count,
                          trainer.resumed_from.name)
        for change in trainer.changes:
            _LOGGER.info("configuration changed: %s", change)

    def _log(self, log: RunLog | None, window: Window) -> None:
        trainer = self._trainer
        general = trainer.config.general
        epoch = (trainer.step_count - 1) // trainer.steps_per_epoch  # of the step that was just taken
        values = {"epoch": epoch, "images": trainer.step_count * general.samples_per_grad_eval,
                  "seconds": round(trainer.seconds, 3)}
        values |= window.read(general.samples_per_grad_eval)
        rates = trainer.learning_rates(trainer.step_count - 1)
        values |= {f"learning_rate/{role}": rate for role, rate in rates.items()}
        if log is not None:
            _attempt(lambda: log.write(trainer.step_count, values), "the metrics could not be written")
            if values["skipped_steps"]:
                _LOGGER.warning("step %d: %d of the steps since the last record were skipped: the loss or its gradient "
                                "was not finite", trainer.step_count, values["skipped_steps"])
        if window.skipped_in_a_row >= _SKIPPED_IN_A_ROW:
            text = self._explain_end(window.skipped_in_a_row) if self._is_writer else ""
            self._agree(False)  # the other processes wait here: their end would end this one
            trainer.ranks.fail(TrainingError(text))

    def _explain_end(self, skipped: int) -> str:
        trainer = self._trainer
        text = (f"{trainer.run.path}: the loss or its gradient was not finite in {skipped} steps in a row, up to step "
                f"{trainer.step_count}. {trainer.diagnose()} ")
        try:
            checkpoint = read_checkpoint(trainer.run.path, "training")
        except CheckpointError as error:
            return f"{text}No checkpoint to go on from: {error}"
        return (f"{text}The last good checkpoint is {checkpoint.path}, of step {checkpoint.training['step']}: check the "
                "data, or lower the learning rates in config.json, and go on with --resume.")

    def _evaluate(self, log: RunLog | None, *, grids: bool, metrics: bool) -> bool:
        """Held-out bits/dim, by all processes together, and pictures of the averaged model.

        Args:
            log: None where another process does the work.
            grids: whether to draw samples and reconstructions.
            metrics: whether to measure the FID, if the configuration names a feature extractor.

        Returns:
            Whether the bits/dim are the fewest so far; the process that writes knows.
        """
        trainer, general, output = self._trainer, self._trainer.config.general, self._trainer.config.output
        model, held_out, step = trainer.average, trainer.dataset.held_out, trainer.step_count
        for name, is_done in (("visualization", grids), ("metrics", metrics)):
            if is_done:
                self._restart(name)
        indices = evaluation_indices(len(held_out), output.evaluation_images)
        values = held_out_bits_per_dim(model, held_out, indices, batch_size=general.batch_size,
                                       bits=general.discretization_bits, ranks=trainer.ranks)
        if log is None:
            return False
        if grids:
            self._draw(log, indices)
        if metrics and self._extractor is not None:
            try:
                values["fid"] = measure_fid(model, trainer.dataset, self._extractor, trainer.config)
            except (CheckpointError, DatasetError, OSError) as error:
                _LOGGER.warning("step %d: no FID (%s); training goes on.", step, error)
        _attempt(lambda: log.write(step, values), "the metrics could not be written")
        bits = values[_BEST_BY]
        _LOGGER.info("step %d: held-out %.3f bits/dim", step, bits)
        self._measured = {"step": step, _BEST_BY: bits}
        return bits < self._best

    def _draw(self, log: RunLog, indices: Tensor) -> None:
        """Grids of samples, and of reconstructions of held-out images."""
        trainer, step = self._trainer, self._trainer.step_count
        for folder, grid in (
            (trainer.run.samples, sample_grid(trainer.average, trainer.config)),
            (trainer.run.reconstructions,
             reconstruction_grid(trainer.average, trainer.dataset.held_out, indices, trainer.config)),
        ):
            path = folder / f"step_{step:08d}.png"
            _attempt(lambda: save_png(grid, path), f"{path} could not be written")
            _attempt(lambda: log.write_picture(step, folder.name, grid), f"{path} could not be put into TensorBoard")


def _attempt(write: Callable[[], None], failure: str) -> None:
    try:
        write()
    except OSError as error:
        _LOGGER.warning("%s (%s); training goes on.", failure, error)
