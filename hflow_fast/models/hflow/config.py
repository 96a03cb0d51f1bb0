"""The configuration of HFlow: the original's ``MODEL_PARAMETERS``, checked.

The keys, their order and their meaning are those of the original's JSON files, so that those files are read as they
are; :mod:`.architecture` turns them, once, into the named fields that the modules are built from.
"""

from __future__ import annotations

import os
import re
from typing import Any, Literal, Mapping

from pydantic import Field, field_validator, model_validator

from ...configs import load_config
from ...configs.section import Section
from .architecture import read_levels

__all__ = ["EndblockConfig", "HFlowConfig"]

_PER_LEVEL = (
    "channels skips_channels loss_weights prior_stds num_layers encoder_channels decoder_channels "
    "encoder_decoder_kernels rnvp_channels rnvp_kernel_sizes unet_c_mult permute_scaling pooling_type "
    "unet_n_downscales flow_split_types cond_out_c augmentation_types decoder_rel_noise use_unitary_permute"
).split()
_AUGMENTATION = r"(NOISE|NOEUNET|NO_STYLE|NO_NORM|MEAN)"
_POOLING = r"(blocks_only|unet_only|unet|reduced|double|third-c)"


def _tokens(value: str, token: str, example: str) -> str:
    if not re.fullmatch(rf"({token}(_{token})*)?", value):
        raise ValueError(f"{value!r} is not a list of {token.replace('|', ', ')} joined by '_', such as {example!r}")
    return value


class EndblockConfig(Section):
    """``ENDBLOCK_SETTINGS``: the code of one pixel at the bottom of the hierarchy, split into partitions.

    The first partition has an unconditional flow, each later one a flow conditioned on those before it. A last
    entry of -1 in ``channels`` stands for the channels that remain.
    """

    endres: Literal[1]
    block_y0: bool
    channels: list[int] = Field(min_length=1)
    cond_output_channels: list[int]
    mask_for_style_ind: tuple[int, int]
    mask_for_base_ind: tuple[int, int]
    swap_gs_point: list[int] | None = Field(None, description="Unused, by the original too.")
    layers: list[int]
    rnvp_channels: list[int]
    style_rel_noises: list[float]
    style_rel_noise_scale: float = Field(ge=0)
    use_unitary_permute: bool
    permute_scaling: float = Field(gt=0)
    augmentation_type: str
    mapping_network_lr_scale: float = Field(gt=0)
    endblock_tot_channels: int = Field(gt=0)
    autoencoder_channels: int = Field(gt=0)
    global_state_hidden_channels: int = Field(gt=0)

    @model_validator(mode="before")
    @classmethod
    def _drop_separators(cls, data: Any) -> Any:
        """The original's files hold keys of dashes only, as visual separators."""
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if str(key).strip("-")}
        return data

    @field_validator("augmentation_type")
    @classmethod
    def _known_augmentation(cls, value: str) -> str:
        return _tokens(value, _AUGMENTATION, "NOISE_MEAN_NO_NORM")

    @model_validator(mode="after")
    def _consistent(self) -> EndblockConfig:
        for name in ("cond_output_channels", "layers", "rnvp_channels", "style_rel_noises"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(f"{name.upper()} has {len(getattr(self, name))} entries, CHANNELS has "
                                 f"{len(self.channels)}; give one per partition")
        partitions = self.partitions
        if min(partitions) < 2 or sum(partitions) != self.endblock_tot_channels:
            raise ValueError(f"CHANNELS {self.channels} does not split ENDBLOCK_TOT_CHANNELS = "
                             f"{self.endblock_tot_channels} into partitions of at least 2 channels")
        if self.autoencoder_channels != self.endblock_tot_channels:
            raise ValueError(f"AUTOENCODER_CHANNELS = {self.autoencoder_channels} must equal ENDBLOCK_TOT_CHANNELS = "
                             f"{self.endblock_tot_channels}: the code is the autoencoder's output")
        for name in ("mask_for_style_ind", "mask_for_base_ind"):
            start, end = getattr(self, name)
            if not 0 <= start <= end <= self.endblock_tot_channels:
                raise ValueError(f"{name.upper()} = [{start}, {end}] is not a range of the code's channels")
        return self

    @property
    def partitions(self) -> list[int]:
        """Channels of each partition, with the last one filled in."""
        return [*self.channels[:-1], self.endblock_tot_channels - sum(self.channels[:-1])]


class HFlowConfig(Section):
    """``MODEL_PARAMETERS``: lists have one entry per level, finest first.

    See ``docs/configuration.md`` for each key.
    """

    resolutions: list[int] = Field(min_length=1)
    channels: list[int]
    skips_channels: list[int]
    loss_weights: list[float]
    prior_stds: list[float]
    num_layers: list[int]
    encoder_channels: list[int]
    decoder_channels: list[int]
    encoder_decoder_kernels: list[Literal[1, 3, 5, 7]]
    rnvp_channels: list[int]
    rnvp_kernel_sizes: list[Literal[1, 3, 5, 7]]
    unet_c_mult: list[float]
    permute_scaling: list[float]
    pooling_type: list[str]
    unet_n_downscales: list[int]
    flow_split_types: list[str]
    cond_out_c: list[int]
    global_net_channels: int
    augmentation_types: list[str]
    decoder_rel_noise: list[float]
    use_unitary_permute: list[bool]
    encoder_lr_scale: float = Field(gt=0)
    decoder_lr_scale: float = Field(gt=0)
    endblock_settings: EndblockConfig

    @field_validator("augmentation_types")
    @classmethod
    def _known_augmentations(cls, value: list[str]) -> list[str]:
        return [_tokens(item, _AUGMENTATION, "NOISE_NO_STYLE_NO_NORM") for item in value]

    @field_validator("pooling_type")
    @classmethod
    def _known_pooling(cls, value: list[str]) -> list[str]:
        return [_tokens(item, _POOLING, "blocks_only_reduced") for item in value]

    @model_validator(mode="after")
    def _consistent(self) -> HFlowConfig:
        for name in _PER_LEVEL:
            if len(getattr(self, name)) != len(self.resolutions):
                raise ValueError(f"{name.upper()} has {len(getattr(self, name))} entries, RESOLUTIONS has "
                                 f"{len(self.resolutions)}; give one per level")
        self._check_resolutions()
        for name in ("rnvp_channels", "encoder_channels", "decoder_channels", "num_layers", "cond_out_c",
                     "skips_channels", "unet_n_downscales"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name.upper()} = {getattr(self, name)}: every entry must be at least 1")
        if any(channels % 2 for channels in (*self.rnvp_channels, *self.endblock_settings.rnvp_channels)):
            raise ValueError("RNVP_CHANNELS must be even: half predicts the scale, half the shift")
        if self.has_style:
            self._check_style()
        if any(scaling <= 0 for scaling in (*self.permute_scaling, *self.prior_stds)):
            raise ValueError("PERMUTE_SCALING and PRIOR_STDS must be positive")
        return self

    @property
    def has_style(self) -> bool:
        """Whether a style network exists: some level uses it, and it has channels."""
        return self.global_net_channels > 0 and any("NO_STYLE" not in item for item in self.augmentation_types)

    def _check_style(self) -> None:
        endblock = self.endblock_settings
        if endblock.global_state_hidden_channels != self.global_net_channels:
            raise ValueError(f"GLOBAL_NET_CHANNELS = {self.global_net_channels} must equal ENDBLOCK_SETTINGS."
                             f"GLOBAL_STATE_HIDDEN_CHANNELS = {endblock.global_state_hidden_channels}")
        start, end = endblock.mask_for_style_ind
        if end - start == endblock.endblock_tot_channels:
            raise ValueError("ENDBLOCK_SETTINGS.MASK_FOR_STYLE_IND hides the whole code from the style network; "
                             "leave it some channels, or put NO_STYLE into every AUGMENTATION_TYPES")

    def _check_resolutions(self) -> None:
        if self.channels[0] != 3:
            raise ValueError(f"CHANNELS[0] = {self.channels[0]}: the finest level is the image, with 3 channels")
        if min(self.channels) < 2:
            raise ValueError(f"CHANNELS = {self.channels}: every level needs at least 2 channels to split")
        if self.resolutions[-1] != 8:
            raise ValueError(f"RESOLUTIONS ends in {self.resolutions[-1]}; the lowest level must be 8 (8 x 8 pixels)")
        for fine, coarse in zip(self.resolutions, self.resolutions[1:]):
            if fine not in (2 * coarse, 4 * coarse):
                raise ValueError(f"RESOLUTIONS: {fine} is followed by {coarse}; each level must be 2 or 4 times "
                                 "the next")

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any] | HFlowConfig) -> HFlowConfig:
        """From a preset's name, a path, or a mapping: a whole configuration or its ``MODEL_PARAMETERS`` alone.

        Raises:
            ConfigError: with every key that is unknown, missing or inconsistent.
        """
        if isinstance(source, HFlowConfig):
            return source
        if isinstance(source, Mapping) and "RESOLUTIONS" in source:
            source = {"MODEL_PARAMETERS": source}
        config = cls.parse(load_config(source, model="hflow")["MODEL_PARAMETERS"], "MODEL_PARAMETERS")
        read_levels(config)  # checks what the strings mean together
        return config

    def to_dict(self) -> dict[str, Any]:
        """``MODEL_PARAMETERS`` as in the original's files: JSON-ready, accepted by :meth:`load`."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True)
