"""Giving a model of another library the fused layers, in place."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Iterator, NamedTuple

from torch import nn

__all__ = ["AccelerationReport", "LeftLayer", "Match", "ReplacedLayer", "accelerate"]

_ADAPTERS = {"normflows": "normflows", "FrEIA": "freia", "nflows": "nflows", None: "glow_pytorch"}
"""Which module of this package knows which library, by the name it is imported by. None: code that people copy, which is
recognised by its structure."""


class Match(NamedTuple):
    """What an adapter has to say of a layer of its library."""

    fast: type[nn.Module] | None
    """The subclass of the layer's class that takes its place; None: it has to stay."""
    reason: str = ""
    """Why it has to stay."""


@dataclass(frozen=True)
class ReplacedLayer:
    """A layer that runs fused now."""

    name: str
    """As in :meth:`torch.nn.Module.named_modules`; "" is the model itself."""
    kind: str
    """The class it was, ``library.Class``."""


@dataclass(frozen=True)
class LeftLayer:
    """A layer that stays as it was, although its library, or a layer of this name, is known."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate` did; as text, a table."""

    replaced: tuple[ReplacedLayer, ...]
    left: tuple[LeftLayer, ...]

    def __str__(self) -> str:
        lines = [f"replaced {count} × {kind}" for kind, count in Counter(layer.kind for layer in self.replaced).items()]
        lines += [f"left {layer.name or 'the model'} ({layer.kind}): {layer.reason}" for layer in self.left]
        return "\n".join(lines) or "nothing replaced: no layer of a known library"


def accelerate(model: nn.Module) -> AccelerationReport:
    """Makes the layers that it knows in ``model`` run fused, in place.

    Each gets the class of an adapter, a subclass of its own. Parameters, buffers, their names and the optimizer's
    references to them stay as they are, so a ``state_dict`` goes both ways.
    """
    raise NotImplementedError
