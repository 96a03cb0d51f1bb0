"""The state of a training run and its step."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batches, ImageDataset, dequantize
from ..errors import CheckpointError, ConfigError, DatasetError
from .checkpoint import load_weights, read_checkpoint, save_checkpoint
from .config import GeneralConfig, TrainConfig
from .ema import update_average
from .optimizer import build_optimizer, clip_and_step, set_epoch
from .run import RunDirectory

__all__ = ["StepResult", "Trainer", "check_dataset"]

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

    Args:
        model: with the interface of :class:`hflow_fast.models.HFlow`; moved to ``device``.
        dataset: of the model's resolution.
        run: if it has a checkpoint, training goes on from there, exactly as if it had not been interrupted.
        config: the whole configuration, kept in the checkpoints.
        device: where to train.

    Raises:
        ConfigError: a section of ``config`` is not valid.
        DatasetError: the dataset does not fit the model, is too small, or is not the one of the checkpoint.
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self, model: nn.Module, dataset: ImageDataset, run: RunDirectory, config: dict[str, Any],
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = TrainConfig.from_config(config)
        general = self.config.general
        check_dataset(dataset, model.resolution, general)
        self.model = model.to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.dataset = dataset
        self.run = run
        self.device = torch.device(device)
        self.step_count = 0
        self.seconds = 0.0
        """Training time over all sessions, as of the last save."""
        self.steps_per_epoch = len(dataset.train) // general.samples_per_grad_eval
        self._raw_config = config
        self._optimizer = build_optimizer(self.model.parameter_groups(), general)
        self._batches = Batches(len(dataset.train), general.samples_per_grad_eval, seed=general.seed)
        torch.manual_seed(general.seed)
        if run.checkpoint.is_file():
            self._restore()

    @property
    def epoch(self) -> int:
        """The epoch of the next step, counted from 0."""
        return self.step_count // self.steps_per_epoch

    def initialize(self) -> None:
        """Data-dependent initialisation of the model; without effect when the run has a checkpoint."""
        if self.step_count:
            return
        general = self.config.general
        count = min(_INITIAL_BATCHES * general.batch_size, len(self.dataset.train))
        choice = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(general.seed))[:count]
        self.model.initialize(self._dequantize(self.dataset.train[choice.sort().values]))
        update_average(self.average, self.model, 1.0)

    def step(self) -> StepResult:
        """One optimizer step on the next SAMPLES_PER_GRAD_EVAL images, taken in passes of BATCH_SIZE."""
        general = self.config.general
        epoch = self.epoch
        set_epoch(self._optimizer, epoch, general)
        self.model.train()
        parts = self.dataset.train[next(self._batches)].split(general.batch_size)
        loss = torch.zeros((), device=self.device)
        with getattr(self.model, "prepared", nullcontext)():  # what depends on the weights alone: once for all passes
            for part in parts:
                part_loss = self.model.loss(self._dequantize(part)).mean() / len(parts)
                part_loss.backward()
                loss += part_loss.detach()
        norm, skipped = clip_and_step(self._optimizer, loss, general.grad_clip)
        update_average(self.average, self.model, 1.0 if epoch == 0 else general.ema_weight)
        self.step_count += 1
        return StepResult(loss, norm, skipped)

    def save(self) -> None:
        """Replaces the run's checkpoint.

        Raises:
            CheckpointError: it cannot be written; the previous one is intact.
        """
        training = {
            "step": self.step_count,
            "seconds": self.seconds,
            "dataset": self.dataset.fingerprint,
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        save_checkpoint(self.run.checkpoint, self._raw_config, self.model, self.average, training)

    def _restore(self) -> None:
        checkpoint = read_checkpoint(self.run.checkpoint, "model", "average", "training")
        training = checkpoint.training
        if checkpoint.model is None or checkpoint.average is None or training is None:
            raise CheckpointError(f"{checkpoint.path}: holds a model but not the state of its training.")
        if training["dataset"] != self.dataset.fingerprint:
            raise DatasetError(f"{self.dataset.path}: not the dataset this run was started with; "
                               "give the original one with --data, or start a new run.")
        load_weights(self.model, checkpoint.model, checkpoint.path)
        load_weights(self.average, checkpoint.average, checkpoint.path)
        self._optimizer.load_state_dict(training["optimizer"])
        self._batches.load_state_dict(training["batches"])
        self.step_count, self.seconds = training["step"], training["seconds"]
        torch.set_rng_state(training["random"])
        if self.device.type == "cuda" and training["random_cuda"] is not None:
            torch.cuda.set_rng_state(training["random_cuda"], self.device)

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
