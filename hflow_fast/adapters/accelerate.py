"""Giving a model of another library the fused layers, in place, and taking them away again."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Mapping

from torch import nn

from .._extension import has_kernel, missing_reason
from ._survey import Survey, wrapper_of
from .networks import match as match_network
from .report import AccelerationReport, LeftLayer, Match, ReplacedLayer

__all__ = ["AccelerationReport", "LeftLayer", "Match", "ReplacedLayer", "accelerate", "match_exactly", "restore"]

_ADAPTERS = {"normflows": "normflows", "FrEIA": "freia", "nflows": "nflows", None: "glow_pytorch"}
"""Which module of this package knows which library, by the name it is imported by. None: code that people copy, which
is recognised by its structure."""


def accelerate(model: nn.Module) -> AccelerationReport:
    """Makes the layers that it knows in ``model`` run fused, in place.

    Knows layers of normflows, FrEIA, nflows, and of the PyTorch ports of Glow. Each gets the class of an adapter, a
    subclass of its own: same outputs, log-dets and gradients to rounding, fewer passes. Parameters, buffers, their
    names and the optimizer's references to them stay as they are, so a ``state_dict`` goes both ways. What it does not
    know, or cannot replace without a change that someone might notice, is left as it is, and the report says why:
    layers with hooks, with tied weights, not yet initialised from data, on another device, subclasses. Hooks added
    *later* to a layer inside a replaced one may not be called. :func:`restore` takes everything back.

    Args:
        model: any module; ``DataParallel`` and ``DistributedDataParallel`` around it are fine.

    Returns:
        What was replaced and what was left, and why; print it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` was compiled, scripted or sharded before.

    Example:
        >>> report = accelerate(nn.Sequential(nn.Linear(2, 2)))
        >>> print(report)
        nothing replaced: no layer of a known library
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}; give it the model "
                        "itself, or each of its modules.")
    wrapper = wrapper_of(model)
    if wrapper is not None:
        raise ValueError(f"accelerate: {type(model).__name__} {wrapper}.")
    adapters, left = _load_adapters()
    survey = Survey(model)
    replaced, already, changes = [], [], []
    networks: set[int] = set()
    for name, module in model.named_modules():
        kind = _kind(stock_class(module) or type(module))
        if stock_class(module) is not None:
            already.append(ReplacedLayer(name, kind))
            continue
        match = next(filter(None, (adapter.match(module) for adapter in adapters)), None)
        if match is None and id(module) in networks:
            match = match_network(module)
        if match is None:
            continue
        reason = match.reason if match.fast is None else survey.obstacle(module, match)
        networks.difference_update(map(id, module.modules()))  # a layer that stays does so with its network
        if reason is None:
            called = set(module.children()).intersection(match.calls)
            networks.update(id(inner) for network in called for inner in network.modules())
            replaced.append(ReplacedLayer(name, kind))
            changes.append((module, match.fast))
        else:
            left.append(LeftLayer(name, kind, reason))
    # Judged before anything changes: adapters recognise layers by the stock classes around them.
    for module, fast in changes:
        module.__class__ = fast
    return AccelerationReport(tuple(replaced), tuple(left), tuple(already), _note(model) if replaced else "")


def restore(model: nn.Module) -> list[str]:
    """Takes back what :func:`accelerate` did to ``model``, in place; after it nothing of this package is left in it.

    A model saved whole (``torch.save(model)``, pickle) can then be loaded where this package is not installed; a
    ``state_dict`` needs no such thing.

    Returns:
        The names of the layers that got their own class again.
    """
    restored = []
    for name, module in model.named_modules():
        stock = stock_class(module)
        if stock is not None:
            module.__class__ = stock
            for attribute in [key for key, value in vars(module).items() if _is_ours(type(value))]:
                delattr(module, attribute)
            restored.append(name)
    return restored


def stock_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a layer with a fast one had before; None: it has no fast one."""
    if not type(module).__module__.startswith(f"{__package__}."):
        return None
    return next(base for base in type(module).__mro__ if not _is_ours(base))


def match_exactly(module: nn.Module, fast: Mapping[type[nn.Module], type[nn.Module]]) -> Match | None:
    """The fast class of ``module`` where its class is a key of ``fast``; why it stays where it is derived from one."""
    if type(module) in fast:
        return Match(fast[type(module)])
    if nn.utils.parametrize.is_parametrized(module):
        return Match(None, "is parametrized (torch.nn.utils.parametrize)") if isinstance(module, tuple(fast)) else None
    base = next((base for base in type(module).__mro__ if base in fast), None)
    return None if base is None else Match(None, f"is a subclass of {_kind(base)}, which may do something else")


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith(f"{__package__.split('.')[0]}.")


def _kind(stock: type) -> str:
    return f"{stock.__module__.split('.')[0]}.{stock.__name__}"


def _load_adapters() -> tuple[list[ModuleType], list[LeftLayer]]:
    """The adapters of the libraries that are imported: of others there can be no layer. And those that do not load."""
    adapters, left = [], []
    for library, name in _ADAPTERS.items():
        if library is None or library in sys.modules:
            try:
                adapters.append(importlib.import_module(f".{name}", __package__))
            except (AttributeError, ImportError) as error:
                left.append(LeftLayer("", library or name, f"its adapter does not fit this version ({error})"))
    return adapters, left


def _note(model: nn.Module) -> str:
    """Of kernels that are missing where the model is."""
    for parameter in model.parameters():
        if not has_kernel("flow_step", parameter.device):
            reason = missing_reason() or f"the extension was built without {parameter.device.type}"
            return f"runs on the plain torch reference, which is no faster: {reason}"
    return ""
