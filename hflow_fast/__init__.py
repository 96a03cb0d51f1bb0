"""Fused normalizing-flow layers for PyTorch, and the hierarchical flow model built on them.

- :mod:`hflow_fast.ops`: the fused operations as differentiable functions.
- :mod:`hflow_fast.nn`: the layers.
- :mod:`hflow_fast.models`: complete models.
- :func:`hflow_fast.accelerate`: the fused layers in a model written with normflows, FrEIA, nflows or a port of Glow.
- :mod:`hflow_fast.adapters`: those layers, one by one.
- :mod:`hflow_fast.reference`: the meaning of every operation in plain torch.
- :mod:`hflow_fast.inference`: samples, reconstructions and pictures from a trained model.
- :mod:`hflow_fast.compat`: files of the original implementation, read without running anything in them.
- :mod:`hflow_fast.testing`: property tests for flow layers, also of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, DatasetError

if TYPE_CHECKING:
    from .adapters import accelerate

__version__ = "0.1.0"
__all__ = ["CheckpointError", "ConfigError", "DatasetError", "__version__", "accelerate"]

_SUBMODULES = ("adapters", "compat", "configs", "data", "inference", "metrics", "models", "nn", "ops", "reference",
               "testing", "training")


def __getattr__(name: str) -> Any:
    # Submodules load on first use: the command line answers quickly, and the layers do not import the trainer.
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "accelerate":
        return importlib.import_module(".adapters", __name__).accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
