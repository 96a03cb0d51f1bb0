"""What the configuration's strings and lists mean: one :class:`LevelSpec` per level, with named fields.

This is the only place that parses them; the modules are built from these fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...errors import ConfigError
from ...ops import CouplingSpec

if TYPE_CHECKING:
    from .config import HFlowConfig

__all__ = ["SCALE_CLAMP", "DecoderSpec", "LevelSpec", "StepSpec", "hflow_coupling", "read_levels"]

_CHECKERBOARD_BLOCKS = {"spatial": 1, "blocks": 2, "lblocks": 4, "hblocks": 8}
_HALVES = {"vhalfs": "columns", "hhalfs": "rows"}
_MIXED = ("blocks-channels", "hblocks-lblocks-blocks-channels")

SCALE_CLAMP = 3.0
SHIFT_CLAMP = 5.0


@dataclass(frozen=True)
class StepSpec:
    """One flow step: what its coupling transforms, and the network that predicts the transform."""

    coupling: CouplingSpec
    network: Literal["plain", "pooling"]
    hidden_channels: int
    kernel: int
    unet_kernel: int
    unet_levels: int
    unet_growth: float
    halvings_per_level: int
    context_channels: int

    @property
    def flip(self) -> int | None:
        """The dimension along which a half-image coupling mirrors what its network sees.

        Without it the passive half would be as far as possible from the half it predicts.
        """
        return {"columns": -1, "rows": -2}.get(self.coupling.active)


@dataclass(frozen=True)
class DecoderSpec:
    """The decoder of a level: from the target below (and a skip) to what conditions this level's flow."""

    hidden_channels: int
    skip_channels: int
    noise: float
    normalize: bool
    style: bool
    unet_on_shift: bool
    lr_scale: float


@dataclass(frozen=True)
class LevelSpec:
    """One level of the hierarchy: resolution, its encoder, decoder and flow (``steps`` from image to latent)."""

    resolution: int
    channels: int
    target_channels: int
    ratio: int
    is_finest: bool
    is_lowest: bool
    encoder_in_channels: int
    encoder_channels: int
    encoder_kernel: int
    encoder_lr_scale: float
    decoder: DecoderSpec
    skip_out_channels: int
    context_channels: int
    flow_noise: float | None
    steps: tuple[StepSpec, ...]
    permute_gain: float
    orthogonal: bool
    prior_std: float
    loss_weight: float


def read_levels(config: HFlowConfig) -> list[LevelSpec]:
    """The levels, finest first.

    Raises:
        ConfigError: a split type is unknown, does not fit the number of layers, or its mask does not tile the level.
    """
    return [_read_level(config, index) for index in range(len(config.resolutions))]


def _read_level(config: HFlowConfig, index: int) -> LevelSpec:
    last = index == len(config.resolutions) - 1
    resolution = config.resolutions[index]
    augmentation = config.augmentation_types[index]
    # The noise on a level's own targets is switched by the level above, whose decoder sees them.
    noisy_targets = index > 0 and "NOISE" in config.augmentation_types[index - 1]
    return LevelSpec(
        resolution=resolution,
        channels=config.channels[index],
        target_channels=config.endblock_settings.autoencoder_channels if last else config.channels[index + 1],
        ratio=2 if last else resolution // config.resolutions[index + 1],
        is_finest=index == 0,
        is_lowest=last,
        encoder_in_channels=config.channels[0] if index == 0 else config.encoder_channels[index - 1],
        encoder_channels=config.encoder_channels[index],
        encoder_kernel=config.encoder_decoder_kernels[index],
        encoder_lr_scale=config.encoder_lr_scale,
        decoder=DecoderSpec(
            hidden_channels=config.decoder_channels[index],
            skip_channels=config.skips_channels[index],
            noise=config.decoder_rel_noise[index] if "NOISE" in augmentation and not last else 0.0,
            normalize="NO_NORM" not in augmentation,
            style=config.has_style and "NO_STYLE" not in augmentation,
            unet_on_shift="NOEUNET" not in augmentation and resolution > 8,
            lr_scale=config.decoder_lr_scale,
        ),
        skip_out_channels=config.skips_channels[index - 1] if index else 0,
        context_channels=config.cond_out_c[index],
        flow_noise=config.decoder_rel_noise[index - 1] if noisy_targets else None,
        steps=tuple(_read_step(config, index, split, number)
                    for number, split in reversed(list(enumerate(_splits(config, index))))),
        permute_gain=config.permute_scaling[index],
        orthogonal=config.use_unitary_permute[index],
        prior_std=config.prior_stds[index],
        loss_weight=config.loss_weights[index],
    )


def _splits(config: HFlowConfig, index: int) -> list[str]:
    """The split type of each step, numbered as the original numbers them (z → x)."""
    value, layers = config.flow_split_types[index], config.num_layers[index]
    parts = value.split("-")
    if len(parts) > 1 and value not in _MIXED:
        raise ConfigError(f"FLOW_SPLIT_TYPES.{index}: unknown mixture {value!r}; known are {', '.join(_MIXED)}.")
    unknown = [part for part in parts if part not in ("channels", *_CHECKERBOARD_BLOCKS, *_HALVES)]
    if unknown:
        raise ConfigError(f"FLOW_SPLIT_TYPES.{index}: unknown split {unknown[0]!r}; known are channels, "
                          f"{', '.join([*_CHECKERBOARD_BLOCKS, *_HALVES])}.")
    if layers % len(parts):
        raise ConfigError(f"NUM_LAYERS.{index} = {layers} must be a multiple of {len(parts)}, "
                          f"the number of splits in FLOW_SPLIT_TYPES.{index} = {value!r}.")
    return [part for part in parts for _ in range(layers // len(parts))]


def _read_step(config: HFlowConfig, index: int, split: str, number: int) -> StepSpec:
    resolution, pooling = config.resolutions[index], config.pooling_type[index]
    coupling = hflow_coupling(split, number)
    if coupling.active == "checkerboard" and resolution % (2 * coupling.block):
        raise ConfigError(f"FLOW_SPLIT_TYPES.{index}: the {split!r} mask (blocks of {coupling.block}) cannot tile "
                          f"resolution {resolution}; it needs a multiple of {2 * coupling.block}.")
    pooled = pooling and ("blocks_only" not in pooling or split.endswith(("blocks", "halfs")))
    halvings = 2 if "double" in pooling else 1
    levels = config.unet_n_downscales[index]
    if pooled and resolution >> (halvings * levels) < 1:
        raise ConfigError(f"UNET_N_DOWNSCALES.{index} = {levels}: resolution {resolution} cannot be halved "
                          f"{halvings * levels} times.")
    hidden = config.rnvp_channels[index]
    if pooled and "third-c" in pooling and "blocks_only" not in pooling:
        hidden = hidden // 3
    return StepSpec(
        coupling=coupling,
        network="pooling" if pooled else "plain",
        hidden_channels=hidden,
        kernel=config.rnvp_kernel_sizes[index],
        unet_kernel=1 if "reduced" in pooling else config.rnvp_kernel_sizes[index],
        unet_levels=levels,
        unet_growth=config.unet_c_mult[index],
        halvings_per_level=halvings,
        context_channels=config.cond_out_c[index],
    )


def hflow_coupling(split: str, number: int) -> CouplingSpec:
    """The coupling of step ``number``: z = (x − shift)·exp(−scale) on the active set, both clipped.

    Channel splits always keep the first half passive; the spatial sets alternate with the number's parity.
    """
    affine = dict(scale_map="exp_clip", clamp=SCALE_CLAMP, shift_clamp=SHIFT_CLAMP)
    even = number % 2 == 0
    if split == "channels":
        return CouplingSpec(active="channels", **affine)
    if split in _HALVES:
        return CouplingSpec(active=_HALVES[split], parity=int(even), **affine)
    # With blocks of one pixel the original starts from the complementary board.
    return CouplingSpec(active="checkerboard", block=_CHECKERBOARD_BLOCKS[split],
                        parity=int(even if split == "spatial" else not even), **affine)
