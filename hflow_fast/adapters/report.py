"""What :func:`~hflow_fast.adapters.accelerate` found, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, NamedTuple

from torch import nn

__all__ = ["AccelerationReport", "LeftLayer", "Match", "ReplacedLayer"]

_NAMES_SHOWN = 3


class Match(NamedTuple):
    """What an adapter has to say of a layer of its library."""

    fast: type[nn.Module] | None
    """The subclass of the layer's class that takes its place; None: it has to stay."""
    reason: str = ""
    """Why it has to stay."""
    calls: tuple[nn.Module, ...] = ()
    """Submodules that ``fast`` goes on calling as they are, whatever their class: the network of a coupling, the
    children of a container. Hooks, tied weights and the like inside of them are no obstacle to it."""


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
    """What :func:`~hflow_fast.adapters.accelerate` did; as text, a table."""

    replaced: tuple[ReplacedLayer, ...]
    left: tuple[LeftLayer, ...]
    already: tuple[ReplacedLayer, ...] = ()
    """Layers that ran fused before."""
    note: str = ""
    """What else has to be known."""

    def __str__(self) -> str:
        rows = [*_rows("replaced", ((layer.name, layer.kind, "") for layer in self.replaced)),
                *_rows("already fast", ((layer.name, layer.kind, "") for layer in self.already)),
                *_rows("left", ((layer.name, layer.kind, layer.reason) for layer in self.left))]
        if not self.replaced:
            found = "nothing is left to replace" if self.already else "nothing replaced"
            rows.insert(0, (found if rows else f"{found}: no layer of a known library", "", "", ""))
        widths = [max(len(row[column]) for row in rows if row[1]) if any(row[1] for row in rows) else 0
                  for column in range(3)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip()
                 if row[1] else row[0] for row in rows]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def _rows(action: str, layers: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str, str]]:
    """One row for all layers of a kind, and of a reason: what happened, how often, to what, where and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, kind, reason in layers:
        groups.setdefault((kind, reason), []).append(name or "the model")
    return [(action, f"{len(names)} ×", kind, f"{_listed(names)}: {reason}" if reason else _listed(names))
            for (kind, reason), names in groups.items()]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, …"
