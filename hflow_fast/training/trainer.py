"""The state of a training run and its step."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Generator, Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .._replay import Replay, cuda_recorder
from ..data import Batches, ImageDataset, Loader
from ..data.classes import class_labels, number_of_classes
from ..errors import CheckpointError, DatasetError
from ..nn import initialize_locally, set_recompute
from .changes import check_changes
from .checkpoint import load_weights, read_checkpoint, save_checkpoint
from .checks import check_cuda_graph, check_dataset, check_ranks
from .config import TrainConfig
from .diagnosis import diagnose
from .distributed import Ranks, fingerprints
from .ema import update_average
from .optimizer import build_optimizer, clip_and_step, learning_rates, restore, set_epoch
from .passes import Pass, Passes
from .randomness import Use, seed_generators
from .rotation import checkpoint_files, keep_checkpoint
from .run import RunDirectory

__all__ = ["StepResult", "Trainer"]

_LOGGER = logging.getLogger(__name__)
_INITIAL_BATCHES = 16  # batches of images behind the data-dependent initialisation, as in the original


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; tensors are 0-dimensional, on the device."""

    loss: Tensor
    gradient_norm: Tensor
    skipped: Tensor
    """Whether the loss or the gradient was not finite, so that nothing was changed."""
    data_seconds: float
    """How long it waited for images."""


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
        check_dataset(dataset, model.resolution, general, number_of_classes(model))
        check_cuda_graph(torch.device(device), general)
        self.model = model.to(device)
        if hasattr(model, "set_precision"):
            model.set_precision(general.precision)
        set_recompute(self.model, general.memory == "recompute")
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
        self.merged_passes = general.merge_batches
        """How many passes are run as one; None until the first step finds out what memory allows."""
        self.steps_per_epoch = len(dataset.train) // general.samples_per_grad_eval
        self._labels = class_labels(model, dataset.train)
        self._raw_config = config if self._labels is None else _with_class_names(config, dataset)
        self._optimizer = build_optimizer(self.model.parameter_groups(), general, self.steps_per_epoch)
        batches = Batches(len(dataset.train), general.samples_per_grad_eval, seed=general.seed)
        self._loader = Loader(dataset.train, batches, general.batch_size, device=device, share=self.ranks.share,
                              labels=self._labels)
        self._passes = Passes(self.model, general, self.device)
        records = self.device.type == "cuda" and general.cuda_graph != "off"
        self._replay: Replay[tuple[Tensor, Tensor, Tensor]] = Replay(
            partial(cuda_recorder, self._passes.generators) if records else None, name="training",
            required=general.cuda_graph == "on")
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
        set_epoch(self._optimizer, epoch, general, self._warm_up(self.step_count))
        self.model.train()
        waited = self._loader.seconds
        images = next(self._loader)
        waited = self._loader.seconds - waited
        weight = 1.0 if epoch == 0 else general.ema_weight
        inputs = [*images, *self._loader.labels]
        if self.merged_passes is None:
            self.merged_passes = self._passes_that_fit(self._own_passes(inputs))
        results = self._replay.run(partial(self._work, weight=weight), inputs, self._launches(weight), self._changed)
        self.step_count += 1
        # A recorded step writes its results into the same memory each time.
        loss, norm, skipped = [value.clone() for value in results] if self._replay.is_recorded else results
        return StepResult(loss, norm, skipped, waited)

    def learning_rates(self, step: int) -> dict[str, float]:
        """The learning rate of each part of the model in a step, counted from 0."""
        roles = [group["role"] for group in self._optimizer.param_groups]
        return learning_rates(step // self.steps_per_epoch, self.config.general, roles, self._warm_up(step))

    def _warm_up(self, step: int) -> float:
        """The factor on the learning rates: the images seen before the step, of those of WARMUP_EPOCHS."""
        general = self.config.general
        images = general.warmup_epochs * len(self.dataset.train)
        return min(1.0, step * general.samples_per_grad_eval / images) if images else 1.0

    def diagnose(self) -> str:
        """Repeats the last step, which was skipped, and says where the first value arises that is not finite.

        All its passes run in this process alone.
        """
        self.model.train()
        return diagnose(self.model, self._repeated_passes())

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
            "batches": self._loader.state_dict(),
            "merged_passes": self.merged_passes if self.config.general.merge_batches is None else None,
        }
        save_checkpoint(self.run.checkpoint, self._raw_config, self.model, self.average, training,
                        {"step": self.step_count, **notes})

    def _work(
        self, inputs: Sequence[Tensor], weight: float
    ) -> Generator[Callable[[], object], None, tuple[Tensor, Tensor, Tensor]]:
        """A step on the device, in the legs of :mod:`hflow_fast._replay`: nothing in it asks the device for a value.

        Args:
            inputs: of this process's passes the images, uint8; then, for a class-conditional model, their labels.
            weight: of the model in its moving average.

        Returns:
            Loss, gradient norm and whether the step was skipped.
        """
        loss = torch.zeros((), device=self.device)
        passes = iter(self._own_passes(inputs))
        with self._passes.prepared():
            while merged := list(islice(passes, self.merged_passes)):
                yield partial(self._start_noise, merged)
                part_loss = self._passes.loss(merged)
                part_loss.backward()
                loss += part_loss.detach()
        if self.ranks.count > 1:
            yield partial(self.ranks.add_up, [loss, *self._gradients()])
        norm, skipped = clip_and_step(self._optimizer, loss, self.config.general.grad_clip)
        update_average(self.average, self.model, weight, skipped)
        return loss, norm, skipped

    def _launches(self, weight: float) -> Hashable:
        """What the launches of :meth:`_work` depend on, beside the images' shapes; learning rates do not count."""
        parameters = tuple((parameter.data_ptr(), parameter.requires_grad) for parameter in self.model.parameters())
        choices = getattr(self.model, "launch_choices", tuple)()
        return parameters, choices, weight, len(self._loader.parts), self.merged_passes

    def _changed(self) -> Iterator[Tensor]:
        """What a step changes and somebody may cache something of."""
        yield from self.model.parameters()
        yield from self.average.parameters()
        yield from self.average.buffers()

    def _start_noise(self, passes: Sequence[Pass]) -> None:
        self._passes.start_noise(self.step_count, passes)  # that of the step which a recording is replayed in

    def _own_passes(self, inputs: Sequence[Tensor]) -> list[Pass]:
        """This process's passes of a step, given their images and then, if there are any, their labels."""
        own = self.ranks.share(len(self._loader.parts))
        return list(map(Pass, own, inputs[:len(own)], inputs[len(own):] or [None] * len(own)))

    def _passes_that_fit(self, own: Sequence[Pass]) -> int:
        """How many passes all processes have the memory to run as one."""
        count = len(self._loader.parts)
        fitting = min(self.ranks.gather(min(count, self._passes.that_fit(own[0])) if len(own) > 1 else count))
        if fitting > 1 and len(own) > 1:
            _LOGGER.info("memory allows it: up to %d passes of %d images are run as one (MERGE_BATCHES)", fitting,
                         self.config.general.batch_size)
        return fitting

    def _repeated_passes(self) -> Iterator[Tensor]:
        """The passes of the last step, all of them in this process."""
        for number, part in enumerate(self._loader.parts):
            passes = [Pass(number, self.dataset.train[part], self._labels_of(part))]
            self._passes.start_noise(self.step_count - 1, passes)
            yield self._passes.loss(passes)

    def _labels_of(self, indices: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[indices].to(self.device)

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
        restore(self._optimizer, training["optimizer"], self.config.general, self.steps_per_epoch)
        self._loader.load_state_dict(training["batches"])
        if self.merged_passes is None:  # what was found out then, so that rounding is the same from here on
            self.merged_passes = training.get("merged_passes")
        self.step_count, self.seconds = training["step"], training["seconds"]
        self.session_state = training.get("session", {})
        self.resumed_from, self.notes = checkpoint.path, checkpoint.notes

    def _initialize_from_data(self) -> None:
        general = self.config.general
        count = min(_INITIAL_BATCHES * general.batch_size, len(self.dataset.train))
        order = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(general.seed))
        choice = order[:count].sort().values
        seed_generators(self.device, general.seed, Use.INITIALIZATION)
        with initialize_locally():  # one process does this for all
            labels = {} if self._labels is None else {"labels": self._labels_of(choice)}
            self.model.initialize(self._passes.dequantize(self.dataset.train[choice]), **labels)

    def _gradients(self) -> list[Tensor]:
        """The gradients that all processes have; a parameter that got none here counts as zero."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in parameters]

    def _check_ranks_equal(self) -> None:
        if self.ranks.count == 1:
            return
        average = {f"the average of {name}": value for name, value in fingerprints(self.average).items()}
        self.ranks.check_equal({"the step": self.step_count, **fingerprints(self.model), **average})


def _with_class_names(config: dict[str, Any], dataset: ImageDataset) -> dict[str, Any]:
    """What every checkpoint says: whoever samples from it has names for the classes without the dataset."""
    names = config["GENERAL"].get("CLASS_NAMES") or dataset.classes
    return config | {"GENERAL": config["GENERAL"] | {"CLASS_NAMES": names}}
