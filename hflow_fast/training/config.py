"""The training half of a configuration: its sections ``GENERAL`` and ``OUTPUT``."""

from __future__ import annotations

from typing import Annotated, Any, Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigError

__all__ = ["GeneralConfig", "OutputConfig", "TrainConfig"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=str.upper)


class GeneralConfig(_Section):
    """Section ``GENERAL``; the JSON keys are these names in upper case.

    Training ends at the first of ``epochs``, ``steps`` and ``hours`` that is given. ``dataset_name``,
    ``inception_net_path`` and ``num_gpus`` belong to the original and are accepted so that its files can be read.
    """

    learning_rate: NonNegative
    """Of the flows; Adam's step size."""
    learning_rate_decoders: NonNegative
    learning_rate_encoders: NonNegative
    learning_rate_decay_start: Annotated[int, Field(ge=0)]
    """The rates decay on every even epoch (counted from 0) after this one."""
    learning_rate_decay: Factor
    """Factor for flows and decoders."""
    learning_rate_decay_encoders: Factor
    learning_rate_cut_encoders: Annotated[int, Field(ge=0)]
    """From this epoch on the encoders are frozen."""
    batch_size: Count
    """Images per forward pass."""
    samples_per_grad_eval: Count
    """Images per optimizer step; gradients are accumulated over ``samples_per_grad_eval / batch_size`` passes."""
    grad_clip: Positive = 50.0
    """Largest 2-norm of the whole gradient."""
    ema_weight: Factor = 0.005
    """Weight of the newest parameters in their moving average, from epoch 1 on."""
    discretization_bits: Annotated[int, Field(ge=1, le=8)] = 8
    added_noise_std: NonNegative = 0.0
    """Gaussian noise on the training images, in units of the pixel range [0, 1]."""
    horizontal_flips: bool = True
    """Mirror every second training image, at random."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    epochs: Count | None = None
    steps: Count | None = None
    hours: Positive | None = None
    dataset_path: str | None = None
    resize_data_to: Count | None = None
    """Resolution of the data; when given it has to be the model's."""
    dataset_name: str | None = None
    inception_net_path: str | None = None
    num_gpus: Count = 1

    @model_validator(mode="after")
    def _check(self) -> GeneralConfig:
        if self.samples_per_grad_eval % self.batch_size:
            raise ValueError(f"SAMPLES_PER_GRAD_EVAL ({self.samples_per_grad_eval}) has to be a multiple of "
                             f"BATCH_SIZE ({self.batch_size})")
        if self.epochs is self.steps is self.hours is None:
            raise ValueError("one of EPOCHS, STEPS and HOURS has to say when training ends")
        return self


class OutputConfig(_Section):
    """Section ``OUTPUT``; the JSON keys are these names in upper case. Intervals are in hours."""

    checkpoint_every: Positive = 4.0
    visualization_every: Positive = 0.5
    """Interval of sample and reconstruction grids and of the held-out bits/dim."""
    evaluation_images: Count = 1000
    """Held-out images behind each held-out bits/dim, at most."""
    sample_base_sigma: Positive = 0.8
    """Standard deviation of the latents of sample grids."""
    metrics_every: Positive = 4.0
    fid_n_samples: Count = 30000
    fid_gen_std: Positive = 0.8


class TrainConfig(_Section):
    """How to train: see :class:`GeneralConfig` and :class:`OutputConfig`."""

    general: GeneralConfig
    output: OutputConfig = OutputConfig()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrainConfig:
        """Validates the sections ``GENERAL`` and ``OUTPUT`` of a configuration.

        Args:
            config: a configuration as :func:`hflow_fast.configs.load_config` returns it; its section
                ``MODEL_PARAMETERS`` is the model's affair.

        Raises:
            ConfigError: a key is unknown, missing or out of range; the text names every such key.
        """
        try:
            return cls.model_validate({key: value for key, value in config.items() if key != "MODEL_PARAMETERS"})
        except ValidationError as error:
            raise ConfigError("; ".join(map(_explain, error.errors()))) from None


def _explain(problem: Mapping[str, Any]) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"{key}: missing; add this key"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it or check its spelling"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if isinstance(problem["input"], Mapping) else f" (got {problem['input']!r})")
