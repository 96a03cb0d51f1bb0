"""Fast classes for the PyTorch ports of Glow: code that people copy into theirs, which no import tells from other code.

A layer is recognised by the name of its class; by its parameters, buffers, submodules and methods
(:func:`.trial.misfit`); and by what it does (:func:`.trial.disagreement`): what behaves
otherwise, such as a coupling that someone gave another scale, stays as it is. Known are

- rosinality/glow-pytorch: ``ActNorm``, ``InvConv2d``, ``InvConv2dLU``, ``AffineCoupling``, ``Flow``, ``Block``;
- chaiyujin/glow-pytorch and y0ast/Glow-PyTorch: ``ActNorm2d``, ``InvertibleConv1x1``, ``Permute2d``, ``FlowStep``,
  ``SqueezeLayer``, ``Split2d``, ``FlowNet``, and ``Conv2d`` with an actnorm.

Fast classes are subclasses of the class at hand, made once for each. Copies and pickles of fast layers are fast.
"""

from __future__ import annotations

from torch import nn

from ..accelerate import stock_class
from ..report import Match
from . import rosinality
from .chaiyujin_layers import ActNorm2d, Conv2d, InvertibleConv1x1, Permute2d
from .chaiyujin_nets import FlowNet, FlowStep, Split2d, SqueezeLayer
from .port import Port, fast_class
from .trial import disagreement, misfit

__all__ = ["match"]

_PORTS: dict[str, type[Port]] = {
    port.__name__: port for port in (
        rosinality.ActNorm, rosinality.InvConv2d, rosinality.InvConv2dLU, rosinality.AffineCoupling, rosinality.Flow,
        rosinality.Block, ActNorm2d, InvertibleConv1x1, Permute2d, FlowStep, SqueezeLayer, Split2d, FlowNet, Conv2d)}
_COMMON_NAMES = (rosinality.Flow, rosinality.Block, Conv2d)
"""Names that code with no flow in it has, too: one that is built otherwise is no variant of ours."""
_LIBRARIES = ("FrEIA", "hflow_fast", "nflows", "normflows", "torch")


def match(module: nn.Module) -> Match | None:
    """What to do with ``module`` where it is of one of the ports; see :func:`hflow_fast.adapters.accelerate`."""
    kind = type(module)
    base = next((base for base in kind.__mro__ if base.__name__ in _PORTS), None)
    if base is None or base.__module__.split(".")[0] in _LIBRARIES or stock_class(module) is not None:
        return None
    port = _PORTS[base.__name__]
    if base is not kind:
        if nn.utils.parametrize.is_parametrized(module):
            return Match(None, "is parametrized (torch.nn.utils.parametrize)")
        fits = misfit(port, module) is None
        return Match(None, f"is a subclass of {base.__name__}, which may do something else") if fits else None
    reason = misfit(port, module)
    if reason is not None:
        return None if port in _COMMON_NAMES else Match(None, f"is not built like the one of {port.origin}: {reason}")
    reason = port.readiness(module) or disagreement(port, module)
    return Match(None, reason) if reason is not None else Match(fast_class(port, kind), calls=port.called(module))
