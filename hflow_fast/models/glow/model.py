"""The complete Glow."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from ...ops import coupling
from .._inputs import check_images, check_latents, random_latents
from ..bound import LevelTerms, LikelihoodBound, gaussian_log_prob
from ..precision import Precision, choose
from .config import GlowConfig
from .folding import Folding, shared
from .level import Level
from .prior import ClassEmbedding, Classifier, TopPrior

if TYPE_CHECKING:
    from ..hflow.noise import Noise

__all__ = ["Glow"]

_SQUEEZED_CHANNELS = 12


class _Latents(NamedTuple):
    """Of a pass from image to latent."""

    standard: list[Tensor]
    """Of each level, N(0, 1) under the model."""
    log_dets: list[Tensor]
    """(B,) each."""
    top: Tensor
    """The last one before its prior normalises it."""


class Glow(nn.Module):
    """Generative flow with invertible 1 × 1 convolutions (Kingma & Dhariwal, NeurIPS 2018).

    L levels, each a squeeze and K steps (actnorm → permutation → coupling); at the end of each but the last, half of
    the channels leave as a latent, with a prior given the other half. Likelihoods are exact. The details are those of the
    authors' implementation (openai/glow), edge biases, scales e^(3·logs) and class-conditional prior included.

    Several passes with the same weights share what depends on them alone inside :meth:`prepared`.

    Example:
        >>> model = Glow.from_config("glow-tiny-16")
        >>> x = torch.rand(4, 3, 16, 16) - 0.5
        >>> model.initialize(x)
        >>> latents, log_det = model.eval().encode(x)
        >>> reconstruction, _ = model.decode(latents)
        >>> torch.allclose(reconstruction, x, atol=1e-4)
        True
    """

    def __init__(self, config: GlowConfig) -> None:
        super().__init__()
        self.config = config
        shapes = [(_SQUEEZED_CHANNELS << level, config.resolution >> (level + 1)) for level in range(config.levels)]
        self.levels = nn.ModuleList(Level(config, *shape, last=shape is shapes[-1]) for shape in shapes)
        channels, resolution = shapes[-1]
        self.top = TopPrior(channels, resolution, config.edge_bias) if config.learn_top else None
        self.embedding = ClassEmbedding(config.num_classes, channels) if config.conditional else None
        self.classifier = Classifier(channels, config.num_classes) if config.conditional else None
        self._precision: Precision = "fp32"

    @classmethod
    def from_config(cls, source: str | os.PathLike[str] | Mapping[str, Any] | GlowConfig) -> Glow:
        """A freshly initialised model.

        Args:
            source: a preset's name (:func:`hflow_fast.configs.preset_names`), the path of a JSON file, or a mapping of
                the same form.

        Raises:
            ConfigError: naming every key that is unknown, missing or inconsistent.
        """
        return cls(GlowConfig.load(source))

    @property
    def resolution(self) -> int:
        """Height and width of the images."""
        return self.config.resolution

    @property
    def dims(self) -> int:
        """Values per image, 3·R²."""
        return 3 * self.resolution**2

    @property
    def num_classes(self) -> int:
        """Number of classes that images are modelled given; 0: none, and no labels are taken."""
        return self.config.num_classes if self.config.conditional else 0

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of each latent, finest level first."""
        return [level.latent_shape for level in self.levels]

    @property
    def is_initialized(self) -> bool:
        """Whether data, or a checkpoint, has set the activation norms."""
        return all(level.steps.is_initialized for level in self.levels)

    @property
    def precision(self) -> Precision:
        """What :meth:`set_precision` was given; "fp32" before."""
        return self._precision

    def set_precision(self, precision: Precision | None, *, channels_last: bool | None = None) -> Glow:
        """In what the networks compute: those of the couplings and of the splits' priors.

        Parameters, flow variables, scales and shifts as they are applied, log-dets and channel maps are float32 or
        better in all precisions, float64 in :meth:`encode` where the networks are coarser than float32; why, says
        :mod:`hflow_fast.models.precision`.

        Args:
            precision: "fp32"; "tf32", in which a GPU's convolutions round their float32 inputs to 10 bits; "bf16", with
                weights and features in bfloat16. tf32 and fp32 are PyTorch's setting of the whole process
                (:data:`torch.backends.cudnn.allow_tf32`), and until this is called, what it is holds. None: tf32 on a
                GPU, fp32 elsewhere. It is not saved with the weights, which fit all.
            channels_last: memory format of flow variables and features, inside. None: as suits precision and device.

        Returns:
            The model.
        """
        self._precision, form = choose(self, precision, channels_last)
        for module in self.modules():
            if isinstance(module, (Folding, Level)):
                module.take_form(form)
        return self

    def prepared(self) -> AbstractContextManager[None]:
        """A block whose passes share what depends on the parameters alone: folded weights, channel maps, log-dets.

        For the micro-batches of one optimizer step. The gradients of the passes inside gather, and reach the
        parameters' ``grad`` when the block ends, in one backward pass; an exception leaves them out. Losses are the
        same, gradients the same but for rounding. With gradients off it changes nothing: then :meth:`encode`,
        :meth:`decode` and the others keep what they computed until a parameter changes. Nor does it before
        :meth:`initialize`.

        Not with :class:`torch.nn.parallel.DistributedDataParallel`, which waits for each pass's gradients.

        Raises:
            RuntimeError: at the end, where a parameter has changed inside; at the start, where the blocks are nested.
        """
        return shared(self) if torch.is_grad_enabled() and self.is_initialized else nullcontext()

    def launch_choices(self) -> tuple[int | None, ...]:
        """What the launches of a training pass depend on beside shapes: nothing."""
        return ()

    def forward(self, x: Tensor, noise: bool | Noise = True, labels: Tensor | None = None) -> Tensor:
        """:meth:`loss`, so that wrappers of modules (DDP, ``torch.compile``) train the model."""
        return self.loss(x, noise, labels)

    def loss(self, x: Tensor, noise: bool | Noise = True, labels: Tensor | None = None) -> Tensor:
        """The training loss: −log₂ p(x) per dimension, of x as continuous values; the bits of an integer pixel's bin
        come on top, see :meth:`.LikelihoodBound.bits_per_dim`. With classes, p(x | label), and CLASSIFIER_WEIGHT times
        the cross-entropy, in bits, of the label predicted from the last latent.

        In training mode the first call initialises the activation norms from ``x``.

        Args:
            x: (B, 3, R, R) in [-0.5, 0.5], dequantised.
            noise: without effect: Glow adds none. It stands where :meth:`HFlow.loss` has it.
            labels: (B,), int64, from 0 to :attr:`num_classes` − 1, where there are classes.

        Returns:
            (B,).

        Raises:
            ValueError: a shape, a dtype or a label does not fit; labels are missing, or the model has no classes.
        """
        return self.bound(x, noise, labels).loss

    def bound(self, x: Tensor, noise: bool | Noise = True, labels: Tensor | None = None) -> LikelihoodBound:
        """The likelihood behind :meth:`loss`, with every level's terms; arguments as there."""
        check_images(self, x)
        labels = self._checked_labels(labels, x)
        latents = self._to_latents(x, labels)
        terms = {}
        for level, latent, log_det in reversed(list(zip(self.levels, latents.standard, latents.log_dets))):
            dims = math.prod(level.latent_shape)
            terms[level.name] = LevelTerms(gaussian_log_prob(latent, 1.0), log_det, 0.0, dims, dims / self.dims)
        penalty = None
        if self.classifier is not None:
            penalty = self.config.classifier_weight * self.classifier.bits(latents.top, labels)
        return LikelihoodBound(terms, self.dims, penalty)

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Images → latents; exactly inverted by :meth:`decode`.

        Args:
            x: (B, 3, R, R) in [-0.5, 0.5]; any B, also 1.
            labels: as :meth:`loss` takes them.

        Returns:
            The latents, finest level first, each of them N(0, 1) under the model, and log|det| (B,) of the map to all
            of them, so that log p(x) = log|det| + Σ log N(latent; 0, 1). Both are float64 in the precisions "tf32" and
            "bf16": rounded to float32, latents give an image with noise of the networks' size.
        """
        check_images(self, x)
        labels = self._checked_labels(labels, x)
        latents = self._to_latents(x if self.precision == "fp32" else x.double(), labels)
        return [latent.contiguous() for latent in latents.standard], torch.stack(latents.log_dets).sum(dim=0)

    def _to_latents(self, x: Tensor, labels: Tensor | None) -> _Latents:
        standard, log_dets = [], []
        for level in self.levels:
            latent, x, log_det = level(x)
            standard.append(latent)
            log_dets.append(log_det)
        top = standard[-1]
        raw = self._top_raw(top, labels)
        if raw is not None:
            standard[-1], term = coupling(top, raw, TopPrior.SPEC, inverse=True)
            log_dets[-1] = log_dets[-1] + term
        return _Latents(standard, log_dets, top)

    def decode(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents, as from :meth:`encode`, → images (B, 3, R, R) and log|det| (B,), minus that of :meth:`encode`.

        The flow computes in the latents' dtype.

        Raises:
            ValueError: the number of latents or a shape is not that of :attr:`latent_shapes`; or as :meth:`loss` says
                of labels.
        """
        check_latents(self, latents)
        labels = self._checked_labels(labels, latents[-1])
        *finer, latent = latents
        terms = []
        raw = self._top_raw(latent, labels)
        if raw is not None:
            latent, term = coupling(latent, raw, TopPrior.SPEC)
            terms.append(term)
        x = None
        for level, latent in zip(reversed(self.levels), [latent, *reversed(finer)]):
            x, term = level.inverse(latent, x)
            terms.append(term)
        return x.to(next(self.parameters()).dtype).contiguous(), torch.stack(terms).sum(dim=0)

    def latent_stds(self, std: float | Sequence[float] = 1.0) -> list[float]:
        """Standard deviation of each latent when images are sampled, in the order of :attr:`latent_shapes`.

        Args:
            std: temperature of all of them, or one number for each level, finest first.

        Raises:
            ValueError: another number of factors, or one that is negative.
        """
        count = len(self.levels)
        stds = list(std) if isinstance(std, Sequence) else [std] * count
        if len(stds) != count or not all(value >= 0 for value in stds):
            raise ValueError(f"Glow: std must be one number or {count} (one per level, finest first), none of them "
                             f"negative; got {std}.")
        return stds

    @torch.no_grad()
    def sample(self, n: int, std: float | Sequence[float] = 0.7, generator: torch.Generator | None = None,
               labels: Tensor | None = None) -> Tensor:
        """Random images (n, 3, R, R), in about [-0.5, 0.5] (not clipped).

        Args:
            std: temperature, as :meth:`latent_stds` takes it.
            generator: on the model's device; the global one if None.
            labels: (n,), where there are classes; None: random ones.
        """
        if n < 0:
            raise ValueError(f"sample: n must not be negative, got {n}.")
        if labels is None and self.num_classes:
            device = next(self.parameters()).device
            labels = torch.randint(self.num_classes, (n,), generator=generator, device=device)
        return self.decode(random_latents(self, n, std, generator), labels)[0]

    @torch.no_grad()
    def initialize(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Data-dependent initialisation of all activation norms from a batch (B, 3, R, R) in [-0.5, 0.5], once.

        Each gets zero mean and unit variance per channel at its output. Later calls, and calls on a model with loaded
        weights, change nothing. Without it, the first :meth:`loss` in training mode does the same.

        Args:
            labels: without effect.
        """
        check_images(self, x)
        if not self.is_initialized:
            training = self.training
            self.train()
            for level in self.levels:
                _, x, _ = level(x)
            self.train(training)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once, in the groups that have learning rates of their own: here a single one, "flows"."""
        return {"flows": list(self.parameters())}

    def _top_raw(self, z: Tensor, labels: Tensor | None) -> Tensor | None:
        """Mean and logs of the last latent's prior, (B, 2C, R, R); None: it is standard normal."""
        raw = None if self.top is None else self.top.folded()[0][None]
        if self.embedding is not None:
            of_class = self.embedding(labels)
            raw = of_class if raw is None else raw + of_class
        return None if raw is None else raw.expand(len(z), -1, *z.shape[2:])

    def _checked_labels(self, labels: Tensor | None, images: Tensor) -> Tensor | None:
        """The labels where the images are."""
        classes = self.num_classes
        if not classes:
            if labels is not None:
                raise ValueError("Glow: labels are given, but this model has no classes (CONDITIONAL is false).")
            return None
        if labels is None:
            raise ValueError(f"Glow: this model is class-conditional; give labels (B,) from 0 to {classes - 1}.")
        if labels.shape != images.shape[:1] or labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"Glow: labels must be integers of shape ({len(images)},), one per image; got "
                             f"{labels.dtype} of shape {tuple(labels.shape)}.")
        # On a GPU, looking would wait for the device.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = labels[(labels < 0) | (labels >= classes)].tolist()
            if wrong:
                raise ValueError(f"Glow: label {wrong[0]} is none of this model's classes, 0 to {classes - 1}.")
        return labels.to(images.device, torch.int64)
