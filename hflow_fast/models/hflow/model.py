"""The complete hierarchical flow."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from .._inputs import check_images, check_latents, random_latents
from ..bound import LikelihoodBound
from ..precision import NetworkForm, Precision, choose
from .architecture import read_levels
from .config import HFlowConfig
from .decoder import CodeDecoder
from .effective import EffectiveWeights
from .encoder import CodeEncoder
from .endblock import Endblock, StyleNetwork
from .layers import EqualConv2d
from .level import Level
from .noise import Noise
from .original import load_original

__all__ = ["HFlow"]

PIXEL_SCALE = 4.0
"""Factor on pixels in [-0.5, 0.5], which gives natural images about unit variance."""


class HFlow(nn.Module):
    """Hierarchical normalizing flow for images ("Invertible Hierarchical Generative Model for Images", TMLR 2023).

    A learned encoder maps the image, level by level, to smaller targets and finally to a code of one pixel. Each level
    has a conditional flow for its target given the target below; the endblock has one for the code. So the model
    samples from coarse to fine, and its likelihood is bounded by the sum over levels.

    After ``model.to(memory_format=torch.channels_last)`` everything runs in that format, as the weights say. Several
    passes with the same weights share what depends on them alone inside :meth:`prepared`.

    Example:
        >>> model = HFlow.from_config("tiny-16")
        >>> x = torch.rand(2, 3, 16, 16) - 0.5
        >>> latents, log_det = model.eval().encode(x)
        >>> reconstruction, _ = model.decode(latents)
        >>> torch.allclose(reconstruction, x, atol=1e-4)
        True
    """

    def __init__(self, config: HFlowConfig) -> None:
        super().__init__()
        self.config = config
        endblock = config.endblock_settings
        channels = endblock.endblock_tot_channels
        style_channels = config.global_net_channels
        self.levels = nn.ModuleList(Level(spec, style_channels) for spec in read_levels(config))
        self.code_encoder = CodeEncoder(config.encoder_channels[-1], endblock, config.encoder_lr_scale)
        self.code_decoder = CodeDecoder(endblock)
        self.code_projection = EqualConv2d(channels, channels, 1, activation="linear")
        self.style = None
        if config.has_style:
            self.style = StyleNetwork(channels, style_channels, endblock.mapping_network_lr_scale)
        self.endblock = Endblock(endblock)
        self._weights = EffectiveWeights(self)
        self._precision: Precision = "fp32"
        self._form = NetworkForm()

    @classmethod
    def from_config(cls, source: str | os.PathLike[str] | Mapping[str, Any] | HFlowConfig) -> HFlow:
        """A freshly initialised model.

        Args:
            source: a preset's name (:func:`hflow_fast.configs.preset_names`), the path of a JSON file in the
                original's layout, or a mapping of the same form.

        Raises:
            ConfigError: naming every key that is unknown, missing or inconsistent.
        """
        return cls(HFlowConfig.load(source))

    @classmethod
    def from_original(cls, config: str | os.PathLike[str] | Mapping[str, Any] | HFlowConfig,
                      state_dict: Mapping[str, Tensor]) -> HFlow:
        """The model with weights of the original implementation (timoneh/hflow), by its parameter names.

        Raises:
            ConfigError: as :meth:`from_config`.
            CheckpointError: a tensor is missing, left over or of another shape.
        """
        model = cls.from_config(config)
        load_original(model, state_dict)
        return model

    @property
    def resolution(self) -> int:
        """Height and width of the images."""
        return self.config.resolutions[0]

    @property
    def dims(self) -> int:
        """Values per image, 3·R²."""
        return 3 * self.resolution**2

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of each latent: finest level first, the endblock's last."""
        levels = [(level.spec.channels, level.spec.resolution, level.spec.resolution) for level in self.levels]
        return [*levels, (self.config.endblock_settings.endblock_tot_channels, 1, 1)]

    @property
    def precision(self) -> Precision:
        """What :meth:`set_precision` was given; "fp32" before."""
        return self._precision

    def set_precision(self, precision: Precision | None, *, channels_last: bool | None = None) -> HFlow:
        """In what the networks compute: those in the couplings, decoders, the style's and the embeddings.

        Parameters, encoders, the layers that give scales and shifts, flow variables, log-dets, statistics of norms, noise,
        channel maps and exponentials of matrices are float32 or better in all precisions (on a GPU those networks tf32
        but in "fp32"), flow variables float64 in :meth:`encode` where the networks are coarser than float32; why, says
        :mod:`hflow_fast.models.precision`.

        Args:
            precision: "fp32"; "tf32", in which a GPU's convolutions round their float32 inputs to 10 bits; "bf16", with
                weights and features in bfloat16. tf32 and fp32 are PyTorch's setting of the whole process
                (:data:`torch.backends.cudnn.allow_tf32`), and until this is called, what it is holds. None: tf32 on a
                GPU, fp32 elsewhere. It is not saved with the weights, which fit all.
            channels_last: memory format of flow variables and features, inside, and of the parameters, which saves
                copies. None: as suits precision and device.

        Returns:
            The model.
        """
        self._precision, self._form = choose(self, precision, channels_last, many_3x3=True)
        self._weights.take_form(self._form)
        return self

    def prepared(self) -> AbstractContextManager[None]:
        """A block whose passes share what depends on the parameters alone: scaled weights, rotations, log-dets.

        For the micro-batches of one optimizer step: it is computed once, where otherwise every pass does so. The
        gradients of the passes inside gather, and reach the parameters' ``grad`` when the block ends, in one backward
        pass; an exception leaves them out. Losses are the same, gradients the same but for rounding. With gradients off
        it changes nothing: then :meth:`encode`, :meth:`decode` and the others keep what they computed until a parameter
        changes.

        Not with :class:`torch.nn.parallel.DistributedDataParallel`, which waits for each pass's gradients.

        Raises:
            RuntimeError: at the end, where a parameter has changed inside; at the start, where the blocks are nested.

        Example:
            >>> model = HFlow.from_config("tiny-16")
            >>> with model.prepared():
            ...     for _ in range(4):
            ...         (model.loss(torch.rand(2, 3, 16, 16) - 0.5).mean() / 4).backward()
            >>> all(parameter.grad is not None for parameter in model.parameters())
            True
        """
        return self._weights.gathered() if torch.is_grad_enabled() else nullcontext()

    def launch_choices(self) -> tuple[int | None, ...]:
        """What the launches of a training pass depend on beside shapes: when it changes, a CUDA graph is to be captured
        again. To be asked before each replay; it does not wait for the device."""
        return tuple(module.follow() for module in self._weights.affines)

    def targets(self, x: Tensor) -> list[Tensor]:
        """What the flows model: the scaled image, each level's target (finest first), and the code.

        Args:
            x: (B, 3, R, R) in [-0.5, 0.5].
        """
        check_images(self, x)
        with self._weights.kept():
            return self._targets(x)

    def _targets(self, x: Tensor) -> list[Tensor]:
        features = self._form.laid_out(x) * PIXEL_SCALE
        targets: list[Tensor | None] = [features]
        for level in self.levels:
            target, features = level.encoder(features)
            targets.append(target)
        return [*targets[:-1], self.code_encoder(features)]

    def forward(self, x: Tensor, noise: bool | Noise = True) -> Tensor:
        """:meth:`loss`, so that wrappers of modules (DDP, ``torch.compile``) train the model."""
        return self.loss(x, noise)

    def loss(self, x: Tensor, noise: bool | Noise = True) -> Tensor:
        """The training loss: each level's bound in its own bits per dimension, times its weight, summed.

        In training mode the first call initialises the actnorms from ``x``.

        Args:
            x: (B, 3, R, R) in [-0.5, 0.5].
            noise: False replaces every noise sample by zero; the entropy terms stay. A :class:`~.noise.Noise` says
                which images share statistics, and where the samples come from.

        Returns:
            (B,).
        """
        return self.bound(x, noise).loss

    def bound(self, x: Tensor, noise: bool | Noise = True) -> LikelihoodBound:
        """The bound behind :meth:`loss`, with every level's terms; arguments as there."""
        check_images(self, x)
        noise = noise if isinstance(noise, Noise) else Noise(sample=noise)
        noise.check(len(x))
        self._weights.collect()
        with self._weights.kept():
            return self._bound(x, noise)

    def _bound(self, x: Tensor, noise: Noise) -> LikelihoodBound:
        *targets, code = self._targets(x)
        terms = self.endblock.bound(code, noise)
        below, style = self._condition(self.endblock.perturb(code, noise) if noise.sample else code)
        skip = None
        for level, target in zip(reversed(self.levels), reversed(targets)):
            terms[level.name], skip = level.bound(target, below, style, skip, noise=noise, pixel_scale=PIXEL_SCALE)
            below = target
        return LikelihoodBound(terms, self.dims)

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images → latents; exactly inverted by :meth:`decode`.

        Args:
            x: (B, 3, R, R) in [-0.5, 0.5]; any B, also 1.

        Returns:
            The latents, finest level first and the endblock's (B, C, 1, 1) last; and log|det| (B,) summed over all
            flows, without the constant scaling of pixels: minus that of :meth:`decode`. Both are float64 in the
            precisions "tf32" and "bf16": rounded to float32, latents give an image with noise of the networks' size.
        """
        check_images(self, x)
        with self._weights.kept():
            return self._encode(x)

    def _encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        *targets, code = self._targets(x)
        if self.precision != "fp32":
            *targets, code = (target.double() for target in (*targets, code))
        latent, log_det = self.endblock.encode(code)
        latents = [latent]
        below, style = self._condition(code)
        skip = None
        for level, target in zip(reversed(self.levels), reversed(targets)):
            latent, term, skip = level.encode(target, below, style, skip)
            latents.append(latent)
            log_det = log_det + term
            below = target
        return [latent.contiguous() for latent in reversed(latents)], log_det

    def decode(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Latents, as from :meth:`encode`, → images (B, 3, R, R) and log|det| (B,) summed over all flows.

        The flows compute in the latents' dtype.

        Raises:
            ValueError: the number of latents or a shape is not that of :attr:`latent_shapes`.
        """
        check_latents(self, latents)
        with self._weights.kept():
            return self._decode(latents)

    def _decode(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        *latents, code = map(self._form.laid_out, latents)
        below, log_det = self.endblock.decode(code)
        below, style = self._condition(below)
        skip = None
        for level, latent in zip(reversed(self.levels), reversed(latents)):
            below, term, skip = level.decode(latent, below, style, skip)
            log_det = log_det + term
        return (below / PIXEL_SCALE).to(next(self.parameters()).dtype).contiguous(), log_det

    def latent_stds(self, std: float | Sequence[float] = 1.0) -> list[float]:
        """Standard deviation of each latent when images are sampled, in the order of :attr:`latent_shapes`.

        Args:
            std: temperature: factor on every level's prior std. The endblock samples at 1, as in the original. Or one
                factor per level, finest first; one more is the endblock's.

        Raises:
            ValueError: another number of factors, or one that is negative.
        """
        count = len(self.levels)
        factors = list(std) if isinstance(std, Sequence) else [std] * count
        if len(factors) == count:
            factors.append(1.0)
        if len(factors) != count + 1 or not all(factor >= 0 for factor in factors):
            raise ValueError(f"HFlow: std must be one number, {count} (one per level, finest first) or {count + 1} "
                             f"(the endblock's last), none of them negative; got {std}.")
        return [*(factor * level.spec.prior_std for factor, level in zip(factors, self.levels)), factors[-1]]

    @torch.no_grad()
    def sample(self, n: int, std: float | Sequence[float] = 0.8, generator: torch.Generator | None = None) -> Tensor:
        """Random images (n, 3, R, R), in about [-0.5, 0.5] (not clipped).

        Args:
            std: temperature, as :meth:`latent_stds` takes it.
            generator: on the model's device; the global one if None.
        """
        if n < 0:
            raise ValueError(f"sample: n must not be negative, got {n}.")
        return self.decode(random_latents(self, n, std, generator))[0]

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Data-dependent initialisation of the actnorms from a batch (B, 3, R, R) in [-0.5, 0.5], once.

        Each actnorm of a level gets zero mean and unit variance at its output. Later calls, and calls on a model with
        loaded weights, change nothing. Without it, the first :meth:`loss` in training mode does the same.
        """
        if not all(level.flow.affines.is_initialized for level in self.levels):
            training = self.training
            self.train()
            self.loss(x)
            self.train(training)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once, in the groups that have learning rates of their own.

        "encoders": the encoder pyramid; "decoders": the decoders' convolutions; "flows": the flows and what connects
        them (contexts, skips, styles).
        """
        groups: dict[str, list[nn.Parameter]] = {"encoders": [], "flows": [], "decoders": []}
        for name, parameter in self.named_parameters():
            groups[_group(name)].append(parameter)
        return groups

    def _condition(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        """The canvas below the lowest level (B, C, 4, 4), and the style (B, S)."""
        style = None if self.style is None else self.style(code * self.endblock.style_mask)
        canvas = self.code_decoder(self.code_projection(code * self.endblock.base_mask))
        return self._form.laid_out(canvas), style


def _group(name: str) -> str:
    parts = name.split(".")
    if "encoder" in parts or "code_encoder" in parts:
        return "encoders"
    if "styles" in parts:
        return "flows"
    return "decoders" if "decoder" in parts or "code_decoder" in parts else "flows"
