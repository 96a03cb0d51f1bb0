"""The state of a training run and its step."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..data import Batches, ImageDataset, dequantize
from ..errors import CheckpointError, ConfigError, DatasetError
from ..nn import initialize_locally
from .changes import check_changes
from .checkpoint import load_weights, read_checkpoint, save_checkpoint
from .config import GeneralConfig, TrainConfig
from .diagnosis import diagnose
from .distributed import Ranks, fingerprints
from .ema import update_average
from .optimizer import build_optimizer, clip_and_step, set_epoch
from .randomness import Use, seed_generators
from .rotation import checkpoint_files, keep_checkpoint
from .run import RunDirectory

__all__ = ["StepResult", "Trainer", "check_dataset", "check_ranks"]

_INITIAL_BATCHES = 16  # batches of images behind the data-dependent initialisation, as in the original


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; 0-dimensional tensors on the device."""

    loss: Tensor
    gradient_norm: Tensor
    skipped: Tensor
    """Whether the loss or the gradient was not finite, so that nothing was changed."""


class Trainer:
    """A model, the moving average of its parameters, its optimizer and its data, one step at a time.

    Where several processes train together, each has a trainer of its own, all in the same state; the passes of a step
    are dealt out to them. :meth:`initialize`, :meth:`step` and :meth:`save` are then called by all.

    Args:
        model: with the interface of :class:`hflow_fast.models.HFlow`; moved to ``device``.
        dataset: of the model's resolution.
        run: if it has a checkpoint, training goes on from there, exactly as if it had not been interrupted.
        config: the whole configuration, kept in the checkpoints.
        device: where to train.
        ranks: the processes that train together; None for this one alone.

    Raises:
        ConfigError: a section of ``config`` is not valid, something in it cannot change during the run, or there are
            more processes than passes in a step.
        DatasetError: the dataset does not fit the model, is too small, or is not the one of the checkpoint.
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self, model: nn.Module, dataset: ImageDataset, run: RunDirectory, config: dict[str, Any],
        device: torch.device | str = "cpu", ranks: Ranks | None = None,
    ) -> None:
        self.config = TrainConfig.from_config(config)
        general = self.config.general
        self.ranks = ranks or Ranks()
        check_ranks(self.ranks.count, general)
        check_dataset(dataset, model.resolution, general)
        self.model = model.to(device)
        if hasattr(model, "set_precision"):
            model.set_precision(general.precision)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.dataset = dataset
        self.run = run
        self.device = torch.device(device)
        self.step_count = 0
        self.seconds = 0.0
        """Training time over all sessions, as of the last save."""
        self.session_state: dict[str, Any] = {}
        """What the session wants to find again, saved and restored with the rest."""
        self.resumed_from: Path | None = None
        """The checkpoint that training goes on from."""
        self.notes: dict[str, Any] = {}
        """Of that checkpoint."""
        self.changes: list[str] = []
        """Configuration keys that have changed since then."""
        self.steps_per_epoch = len(dataset.train) // general.samples_per_grad_eval
        self._raw_config = config
        self._optimizer = build_optimizer(self.model.parameter_groups(), general)
        self._batches = Batches(len(dataset.train), general.samples_per_grad_eval, seed=general.seed)
        if checkpoint_files(run.checkpoint.parent):
            self._restore()

    @property
    def epoch(self) -> int:
        """The epoch of the next step, counted from 0."""
        return self.step_count // self.steps_per_epoch

    def initialize(self) -> None:
        """Data-dependent initialisation of a fresh model; then, and after a resume, all processes are equal.

        Raises:
            RankError: they are not.
        """
        if self.ranks.count > 1:
            general = self.config.general.model_dump(exclude={"dataset_path"})  # each machine may keep it elsewhere
            self.ranks.check_equal({
                "the checkpoint": self.resumed_from and self.resumed_from.name, "the step": self.step_count,
                "the dataset": self.dataset.fingerprint, "the configuration": json.dumps(general)})
        if self.resumed_from is None:
            if self.ranks.is_writer:
                self._initialize_from_data()
            self.ranks.broadcast(self.model)
            update_average(self.average, self.model, 1.0)
        self._check_ranks_equal()

    def step(self) -> StepResult:
        """One optimizer step on the next SAMPLES_PER_GRAD_EVAL images, taken in passes of BATCH_SIZE."""
        general = self.config.general
        epoch = self.epoch
        set_epoch(self._optimizer, epoch, general)
        self.model.train()
        self._parts = next(self._batches).split(general.batch_size)
        loss = torch.zeros((), device=self.device)
        with getattr(self.model, "prepared", nullcontext)():  # what depends on the weights alone: once for all passes
            for part_loss in self._passes(self.step_count, self.ranks.share(len(self._parts))):
                part_loss.backward()
                loss += part_loss.detach()
        self._add_up_over_ranks(loss)
        norm, skipped = clip_and_step(self._optimizer, loss, general.grad_clip)
        update_average(self.average, self.model, 1.0 if epoch == 0 else general.ema_weight, skipped)
        self.step_count += 1
        return StepResult(loss, norm, skipped)

    def diagnose(self) -> str:
        """Repeats the last step, which was skipped, and says where the first value arises that is not finite.

        All its passes run in this process alone.
        """
        self.model.train()
        return diagnose(self.model, self._passes(self.step_count - 1, range(len(self._parts))))

    def save(self, notes: Mapping[str, Any] = MappingProxyType({}), *, best: bool = False) -> None:
        """Replaces the run's latest checkpoint, and keeps its predecessors as KEEP_CHECKPOINTS says.

        Rank 0 does; the others return when it has.

        Args:
            notes: beside the step, for :attr:`Checkpoint.notes`.
            best: whether it is the best checkpoint so far.

        Raises:
            CheckpointError: it cannot be written; the previous one is intact. Raised in rank 0 only.
            RankError: the processes have come to differ; the previous checkpoint is intact.
        """
        self._check_ranks_equal()
        try:
            if self.ranks.is_writer:
                self._write_checkpoint(notes)
                self.keep(best=best)
        finally:
            self.ranks.any(False)  # none leaves before the file is whole

    def keep(self, *, best: bool) -> None:
        """The second half of :meth:`save`, in rank 0: further names of the latest checkpoint. Harmless to repeat.

        Raises:
            CheckpointError: see :func:`keep_checkpoint`.
        """
        keep_checkpoint(self.run.checkpoint.parent, self.step_count, self.config.output.keep_checkpoints, best=best)

    def _write_checkpoint(self, notes: Mapping[str, Any]) -> None:
        training = {
            "step": self.step_count,
            "seconds": self.seconds,
            "dataset": self.dataset.fingerprint,
            "session": self.session_state,
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches.state_dict(),
        }
        save_checkpoint(self.run.checkpoint, self._raw_config, self.model, self.average, training,
                        {"step": self.step_count, **notes})

    def _passes(self, step: int, numbers: Iterable[int]) -> Iterator[Tensor]:
        """The losses of passes over the last images, each divided by how many make up the step."""
        for number in numbers:
            # The noise of a pass is the same whichever process has it, and whatever came before.
            seed_generators(self.device, self.config.general.seed, Use.STEP, step, number)
            images = self.dataset.train[self._parts[number]]
            yield self.model.loss(self._dequantize(images)).mean() / len(self._parts)

    def _restore(self) -> None:
        checkpoint = read_checkpoint(self.run.path, "model", "average", "training")
        training = checkpoint.training
        if checkpoint.model is None or checkpoint.average is None or training is None:
            raise CheckpointError(f"{checkpoint.path}: holds a model but not the state of its training.")
        if training["dataset"] != self.dataset.fingerprint:
            raise DatasetError(f"{self.dataset.path}: not the dataset this run was started with; "
                               "give the original one with --data, or start a new run.")
        self.changes = check_changes(checkpoint.config, self._raw_config, str(self.run.path))
        load_weights(self.model, checkpoint.model, checkpoint.path)
        load_weights(self.average, checkpoint.average, checkpoint.path)
        self._optimizer.load_state_dict(training["optimizer"])
        self._batches.load_state_dict(training["batches"])
        self.step_count, self.seconds = training["step"], training["seconds"]
        self.session_state = training.get("session", {})
        self.resumed_from, self.notes = checkpoint.path, checkpoint.notes

    def _initialize_from_data(self) -> None:
        general = self.config.general
        count = min(_INITIAL_BATCHES * general.batch_size, len(self.dataset.train))
        choice = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(general.seed))[:count]
        seed_generators(self.device, general.seed, Use.INITIALIZATION)
        with initialize_locally():  # one process does this for all
            self.model.initialize(self._dequantize(self.dataset.train[choice.sort().values]))

    def _add_up_over_ranks(self, loss: Tensor) -> None:
        """Sums ``loss`` and the gradients of all processes; a parameter that got none here counts as zero."""
        if self.ranks.count == 1:
            return
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.add_up([loss, *(parameter.grad for parameter in parameters)])

    def _check_ranks_equal(self) -> None:
        if self.ranks.count == 1:
            return
        average = {f"the average of {name}": value for name, value in fingerprints(self.average).items()}
        self.ranks.check_equal({"the step": self.step_count, **fingerprints(self.model), **average})

    def _dequantize(self, images: Tensor) -> Tensor:
        general = self.config.general
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        return dequantize(images.to(self.device), bits=general.discretization_bits,
                          noise_std=general.added_noise_std, flip=general.horizontal_flips)


def check_dataset(dataset: ImageDataset, resolution: int, config: GeneralConfig) -> None:
    """Whether a model of this resolution can be trained on the dataset.

    Raises:
        ConfigError: the configuration's own RESIZE_DATA_TO is not the model's resolution.
        DatasetError: it is of another resolution, has too few images for one step, or none to evaluate on.
    """
    if config.resize_data_to not in (None, resolution):
        raise ConfigError(f"GENERAL.RESIZE_DATA_TO is {config.resize_data_to}, but the model's RESOLUTIONS begin with "
                          f"{resolution}; make them equal.")
    if dataset.resolution != resolution:
        raise DatasetError(f"{dataset.path}: its images are {dataset.resolution} px, the model's {resolution} px; "
                           f"make a dataset with hflow-fast dataset … --resolution {resolution}.")
    if not len(dataset.held_out):
        raise DatasetError(f"{dataset.path}: no held-out images, so the model could not be judged; "
                           "make the dataset again with --held-out.")
    if len(dataset.train) < config.samples_per_grad_eval:
        raise DatasetError(f"{dataset.path}: {len(dataset.train)} training images are too few for one step; "
                           f"add images or lower SAMPLES_PER_GRAD_EVAL ({config.samples_per_grad_eval}).")


def check_ranks(count: int, config: GeneralConfig) -> None:
    """Whether ``count`` processes can share the passes of a step.

    Raises:
        ConfigError: there are more of them than passes.
    """
    samples, batch = config.samples_per_grad_eval, config.batch_size
    if count <= samples // batch:
        return
    fitting = [size for size in range(1, batch) if samples % size == 0 and samples // size >= count]
    advice = f"lower BATCH_SIZE to {fitting[-1]}, " if fitting else ""
    raise ConfigError(f"{count} processes, but a step has {samples // batch} passes (SAMPLES_PER_GRAD_EVAL {samples} / "
                      f"BATCH_SIZE {batch}): start at most {samples // batch} processes, {advice}or raise "
                      f"SAMPLES_PER_GRAD_EVAL to {count * batch}.")
