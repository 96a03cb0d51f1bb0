"""The training half of a configuration: its sections ``GENERAL`` and ``OUTPUT``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Mapping

from pydantic import Field, field_validator, model_validator

from ..configs import MODEL_KEYS
from ..configs.section import Section

__all__ = ["GeneralConfig", "OutputConfig", "TrainConfig"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class GeneralConfig(Section):
    """Section ``GENERAL``; the JSON keys are these names in upper case."""

    learning_rate: NonNegative
    """The optimizer's step size; of the flows, where a model has other parts, too."""
    learning_rate_decoders: NonNegative | None = None
    """Of the decoders; None: ``learning_rate``."""
    learning_rate_encoders: NonNegative | None = None
    """Of the encoders; None: ``learning_rate``."""
    learning_rate_decay_start: Annotated[int, Field(ge=0)] = 0
    """The rates decay on every even epoch (counted from 0) after this one."""
    learning_rate_decay: Factor = 1.0
    """Factor for flows and decoders."""
    learning_rate_decay_encoders: Factor | None = None
    """Factor for the encoders; None: ``learning_rate_decay``."""
    learning_rate_cut_encoders: Annotated[int, Field(ge=0)] | None = None
    """From this epoch on the encoders are frozen; None: never."""
    warmup_epochs: NonNegative = 0.0
    """The rates grow with the images seen, from 0 to their full size after so many epochs."""
    optimizer: Literal["adam", "adamax"] = "adam"
    """"adamax" is Glow's: see :class:`hflow_fast.training.Adamax`."""
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the optimizer's second moment, for one step. None: 0.999 for adam; for adamax Glow's, 1 − 1/(steps of an
    epoch)."""
    batch_size: Count
    """Images per forward pass."""
    samples_per_grad_eval: Count
    """Images per optimizer step; gradients are accumulated over ``samples_per_grad_eval / batch_size`` passes."""
    merge_batches: Count | None = None
    """Of these passes, how many are run as one; None: as many as there is memory for when training starts. Losses and
    gradients stay those of passes of ``batch_size`` images, but for rounding."""
    memory: Literal["store", "recompute"] = "store"
    """Whether activations are kept for the backward pass or computed again in it: more time, a fraction of the memory,
    the same gradients."""
    grad_clip: Annotated[float, Field(allow_inf_nan=False)] = 50.0
    """Largest 2-norm of the whole gradient; 0 or less: no limit, as in the original."""
    ema_weight: Factor = 0.005
    """Weight of the newest parameters in their moving average, from epoch 1 on."""
    discretization_bits: Annotated[int, Field(ge=1, le=8)] = 8
    """Bits of a pixel value that are modelled; the lower ones are dropped."""
    added_noise_std: NonNegative = 0.0
    """Gaussian noise on the training images, in units of the pixel range [0, 1]."""
    horizontal_flips: bool = True
    """Mirror every second training image, at random."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Arithmetic of the networks; None: tf32 on a GPU, else fp32."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of weights, data order and noise."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """On a GPU, replay each step from CUDA graphs: where they cannot be captured, "auto" does without, "on" ends."""
    epochs: Count | None = None
    """Passes over the training images. Training ends at the first of epochs, steps and hours that is given."""
    steps: Count | None = None
    """Optimizer steps."""
    hours: Positive | None = None
    """Training time, over all sessions of the run."""
    dataset_path: str | None = None
    """Folder made by ``hflow-fast dataset``."""
    resize_data_to: Count | None = None
    """Resolution of the data; when given it has to be the model's."""
    dataset_name: str | None = None
    """The dataset's name inside an HDF5 file of the original; not needed for a folder or for the only one of a file."""
    class_names: list[str] | None = None
    """Of a class-conditional model's classes; None: as the dataset calls them."""
    inception_net_path: str | None = None
    """TorchScript feature extractor of the FID; without one there is no FID."""
    num_gpus: Count = 1
    """Processes that the configuration was made for; how many there are is decided by ``torchrun``."""
    load_checkpoint: str | None = None
    """Checkpoint or run whose weights, the averaged ones where it has them, a new run starts from; null: random ones."""

    @field_validator("dataset_name", "dataset_path", "inception_net_path", "load_checkpoint", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value  # the original's script writes "" for what was not given

    @model_validator(mode="after")
    def _check(self) -> GeneralConfig:
        if self.samples_per_grad_eval % self.batch_size:
            raise ValueError(f"SAMPLES_PER_GRAD_EVAL ({self.samples_per_grad_eval}) has to be a multiple of "
                             f"BATCH_SIZE ({self.batch_size})")
        if self.epochs is self.steps is self.hours is None:
            raise ValueError("one of EPOCHS, STEPS and HOURS has to say when training ends")
        return self


class OutputConfig(Section):
    """Section ``OUTPUT``; the JSON keys are these names in upper case.

    Each interval is given in hours of training time, as in the original, or in optimizer steps, not both.
    """

    checkpoint_every: Positive = 4.0
    """Interval of checkpoints, hours; there is one at the start, at each new best and at the end, too."""
    checkpoint_every_steps: Count | None = None
    visualization_every: Positive = 0.5
    """Interval of sample and reconstruction grids and of the held-out bits/dim, hours."""
    visualization_every_steps: Count | None = None
    metrics_every: Positive = 4.0
    """Interval of the FID, if there is an INCEPTION_NET_PATH, and of the held-out bits/dim, hours."""
    metrics_every_steps: Count | None = None
    keep_checkpoints: Annotated[int, Field(ge=0)] | None = 3
    """Checkpoints kept of the last saves, beside the best; None or 0 keeps all."""
    evaluation_images: Count = 1000
    """Held-out images behind each held-out bits/dim, at most."""
    sample_base_sigma: Positive = 0.8
    """Standard deviation of the latents of sample grids."""
    fid_n_samples: Count = 30000
    """Images, real and generated, behind each FID."""
    fid_gen_std: Positive = 0.8
    """Standard deviation of the latents of the generated ones."""

    @model_validator(mode="after")
    def _one_unit_per_interval(self) -> OutputConfig:
        for name in ("checkpoint_every", "visualization_every", "metrics_every"):
            in_steps = f"{name}_steps"
            if getattr(self, in_steps) is not None and name in self.model_fields_set:
                raise ValueError(f"{name.upper()} (hours) and {in_steps.upper()} are both given; remove one of them")
        return self


class TrainConfig(Section):
    """How to train: see :class:`GeneralConfig` and :class:`OutputConfig`."""

    general: GeneralConfig
    output: OutputConfig = OutputConfig()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrainConfig:
        """Validates the sections ``GENERAL`` and ``OUTPUT`` of a configuration.

        Args:
            config: a configuration as :func:`hflow_fast.configs.load_config` returns it; ``MODEL`` and
                ``MODEL_PARAMETERS`` are the model's affair.

        Raises:
            ConfigError: a key is unknown, missing or out of range; the text names every such key.
        """
        return cls.parse({key: value for key, value in config.items() if key not in MODEL_KEYS}, "")
