"""Models by the name that their configurations give."""

from __future__ import annotations

import os
from typing import Any, Mapping

from torch import nn

from ..configs import load_config, model_name
from .glow import Glow
from .hflow import HFlow

__all__ = ["build_model"]

_CLASSES: dict[str, type[HFlow] | type[Glow]] = {"hflow": HFlow, "glow": Glow}


def build_model(source: str | os.PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model of the kind that the configuration's ``MODEL`` names.

    Args:
        source: a whole configuration, as :func:`hflow_fast.configs.load_config` takes it.

    Raises:
        ConfigError: there is no such model or preset, or a key of its section is unknown, missing or inconsistent.

    Example:
        >>> model = build_model("tiny-16")
        >>> type(model).__name__, model.resolution
        ('HFlow', 16)
    """
    config = load_config(source)
    return _CLASSES[model_name(config)].from_config(config)
