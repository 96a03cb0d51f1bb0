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
- :func:`hflow_fast.keep_freed_memory`: what large batches on a CPU want of the allocator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, DatasetError

if TYPE_CHECKING:
    from ._allocator import keep_freed_memory
    from .adapters import accelerate

__version__ = "0.1.0"
__all__ = ["CheckpointError", "ConfigError", "DatasetError", "__version__", "accelerate", "keep_freed_memory"]

_SUBMODULES = ("adapters", "compat", "configs", "data", "inference", "metrics", "models", "nn", "ops", "reference",
               "testing", "training")
_FUNCTIONS = {"accelerate": ".adapters", "keep_freed_memory": "._allocator"}


def __getattr__(name: str) -> Any:
    # All this loads on first use: the command line answers quickly, and the layers do not import the trainer.
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
