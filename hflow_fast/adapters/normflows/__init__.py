"""The layers and models of normflows (Stimper et al., JOSS 2023) on fused kernels."""

from __future__ import annotations

import normflows as nf
from torch import nn

from ..accelerate import match_exactly
from ..report import Match
from .chain import Fused
from .containers import ClassCondFlow, MultiscaleFlow, NormalizingFlow
from .layers import (FAST_LAYERS, SCALE_MAPS, ActNorm, AffineConstFlow, AffineCoupling, AffineCouplingBlock, GlowBlock,
                     Invertible1x1Conv, Permute)
from .networks import ConvNet2d, is_plain

__all__ = ["ActNorm", "AffineConstFlow", "AffineCoupling", "AffineCouplingBlock", "ClassCondFlow", "ConvNet2d",
           "GlowBlock", "Invertible1x1Conv", "MultiscaleFlow", "NormalizingFlow", "Permute", "match"]

_FAST = {
    **FAST_LAYERS,
    nf.ClassCondFlow: ClassCondFlow,
    nf.MultiscaleFlow: MultiscaleFlow,
    nf.NormalizingFlow: NormalizingFlow,
}
_NO_WORK = (nf.flows.Split, nf.flows.Merge)
"""Nobody misses them in a report."""
_SPLIT_MODES = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")


def match(module: nn.Module) -> Match | None:
    """What to do with ``module``; None where it is not of normflows."""
    found = match_exactly(module, _FAST)
    if found is None:
        if type(module) is nf.flows.Squeeze:
            return Match(None, "is a single copy as it is")
        unknown = isinstance(module, nf.flows.Flow) and not isinstance(module, _NO_WORK)
        return Match(None, "has no fused form") if unknown else None
    if found.fast is None:
        return found
    reason = _obstacle(module)
    return found._replace(calls=_called(module)) if reason is None else Match(None, reason)


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, nf.flows.AffineConstFlow):
        if module.s.dim() < 2 or module.s.numel() != module.s.shape[1]:
            return f"has parameters of shape {tuple(module.s.shape[1:])}, not one per channel"
        flag = getattr(module, "data_dep_init_done", None)
        if flag is not None and not flag.is_meta and not flag:
            return "is not initialised from data yet; run one batch, then accelerate again"
    if isinstance(module, nf.flows.AffineCoupling) and module.scale and module.scale_map not in SCALE_MAPS:
        return f"has the unknown scale map {module.scale_map!r}"
    if isinstance(module, nf.flows.AffineCouplingBlock):
        return _obstacle_of_block(module)
    if isinstance(module, nf.flows.Permute) and module.mode not in ("shuffle", "swap"):
        return f"has the unknown mode {module.mode!r}"
    if isinstance(module, nf.nets.ConvNet2d) and not is_plain(module):
        return "was changed after it was built"
    if isinstance(module, (nf.ClassCondFlow, nf.MultiscaleFlow, nf.NormalizingFlow)) and not _gains(module):
        return "has no layer with a fused form"
    return None


def _obstacle_of_block(block: nf.flows.AffineCouplingBlock) -> str | None:
    split, layer, merge = block.flows if len(block.flows) == 3 else (None, None, None)
    if (type(split), type(merge)) != (nf.flows.Split, nf.flows.Merge) or split.mode != merge.mode \
            or type(layer) not in (nf.flows.AffineCoupling, AffineCoupling):
        return "was changed after it was built"
    if split.mode not in _SPLIT_MODES:
        return f"has the unknown split mode {split.mode!r}"
    return _obstacle(layer)


def _gains(model: nn.Module) -> bool:
    """Whether there is a flow in it that can be fused with another."""
    return any(isinstance(flow, Fused) or issubclass(_FAST.get(type(flow), nn.Module), Fused)
               for flow in model.modules())


def _called(module: nn.Module) -> tuple[nn.Module, ...]:
    """The submodules that the fast class calls whatever they are."""
    if isinstance(module, nf.flows.AffineCoupling):
        return (module.param_map,)
    if isinstance(module, nf.flows.AffineCouplingBlock):
        return (module.flows[1].param_map,)
    if isinstance(module, (nf.flows.GlowBlock, nf.ClassCondFlow, nf.MultiscaleFlow, nf.NormalizingFlow)):
        return tuple(module.children())
    return ()
