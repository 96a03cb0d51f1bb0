"""The configuration of Glow: the section ``MODEL_PARAMETERS``, checked."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Mapping

from pydantic import Field, model_validator

from ...configs import load_config
from ...configs.section import Section

__all__ = ["GlowConfig"]

Count = Annotated[int, Field(ge=1)]


class GlowConfig(Section):
    """``MODEL_PARAMETERS`` of a Glow; the JSON keys are these names in upper case."""

    resolution: Count
    """Height and width of the images, a multiple of 2 to the power of ``levels``."""
    levels: Count
    """L: how often the image is squeezed; after each level but the last, half of the channels leave."""
    steps: Count
    """K: steps per level."""
    width: Count
    """Channels inside the couplings' networks."""
    coupling: Literal["additive", "affine"]
    """Whether a coupling adds to its active half, or adds and scales."""
    permutation: Literal["reverse", "shuffle", "1x1", "1x1_lu"]
    """What mixes the channels before each coupling: their reversal, a fixed random permutation, or a learned 1 × 1
    convolution, stored as it is or as its LU decomposition."""
    edge_bias: bool = True
    """Whether the 3 × 3 convolutions are told where the image ends, by a channel that is 1 on the padding."""
    learn_top: bool = True
    """Whether mean and scale of the last latent's prior are learned."""
    conditional: bool = False
    """Whether the model is one of images given their class."""
    num_classes: Count | None = None
    """Number of classes; needed where ``conditional``, else without effect."""
    classifier_weight: Annotated[float, Field(ge=0)] = 0.01
    """Factor on the cross-entropy, in bits, of the class predicted from the last latent; where ``conditional``."""

    @model_validator(mode="after")
    def _consistent(self) -> GlowConfig:
        if self.resolution % 2**self.levels:
            raise ValueError(f"RESOLUTION = {self.resolution} cannot be halved LEVELS = {self.levels} times; it has to "
                             f"be a multiple of {2**self.levels}")
        if self.conditional and self.num_classes is None:
            raise ValueError("NUM_CLASSES is missing; a model that is CONDITIONAL needs it")
        return self

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any] | GlowConfig) -> GlowConfig:
        """From a preset's name, a path, or a mapping: a whole configuration or its ``MODEL_PARAMETERS`` alone.

        Raises:
            ConfigError: with every key that is unknown, missing or inconsistent.
        """
        if isinstance(source, GlowConfig):
            return source
        if isinstance(source, Mapping) and "RESOLUTION" in source:
            source = {"MODEL": "glow", "MODEL_PARAMETERS": source}
        return cls.parse(load_config(source, model="glow")["MODEL_PARAMETERS"], "MODEL_PARAMETERS")

    def to_dict(self) -> dict[str, Any]:
        """``MODEL_PARAMETERS``: JSON-ready, accepted by :meth:`load`."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True)
