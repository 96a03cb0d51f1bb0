"""FrEIA 0.2: which of its layers run fused."""

from __future__ import annotations

from FrEIA import framework, modules
from torch import nn

from ..accelerate import match_exactly
from ..report import Match
from .all_in_one import AllInOneBlock
from .base import FusedLayer
from .containers import GraphINN, ReversibleGraphNet, ReversibleSequential, SequenceINN
from .couplings import (
    AffineCouplingOneSided,
    ConditionalAffineTransform,
    GINCouplingBlock,
    GLOWCouplingBlock,
    NICECouplingBlock,
    RNVPCouplingBlock,
)
from .maps import ActNorm, Fixed1x1Conv, FixedLinearTransform, PermuteRandom
from .reshapes import HaarDownsampling, HaarUpsampling, IRevNetDownsampling, IRevNetUpsampling

__all__ = [
    "ActNorm", "AffineCouplingOneSided", "AllInOneBlock", "ConditionalAffineTransform", "Fixed1x1Conv",
    "FixedLinearTransform", "GINCouplingBlock", "GLOWCouplingBlock", "GraphINN", "HaarDownsampling", "HaarUpsampling",
    "IRevNetDownsampling", "IRevNetUpsampling", "NICECouplingBlock", "PermuteRandom", "RNVPCouplingBlock",
    "ReversibleGraphNet", "ReversibleSequential", "SequenceINN", "match",
]  # fmt: skip

_LAYERS = {
    modules.ActNorm: ActNorm,
    modules.AffineCouplingOneSided: AffineCouplingOneSided,
    modules.AllInOneBlock: AllInOneBlock,
    modules.ConditionalAffineTransform: ConditionalAffineTransform,
    modules.Fixed1x1Conv: Fixed1x1Conv,
    modules.FixedLinearTransform: FixedLinearTransform,
    modules.GINCouplingBlock: GINCouplingBlock,
    modules.GLOWCouplingBlock: GLOWCouplingBlock,
    modules.HaarDownsampling: HaarDownsampling,
    modules.HaarUpsampling: HaarUpsampling,
    modules.IRevNetDownsampling: IRevNetDownsampling,
    modules.IRevNetUpsampling: IRevNetUpsampling,
    modules.NICECouplingBlock: NICECouplingBlock,
    modules.PermuteRandom: PermuteRandom,
    modules.RNVPCouplingBlock: RNVPCouplingBlock,
}
_CONTAINERS = {
    framework.GraphINN: GraphINN,
    framework.ReversibleGraphNet: ReversibleGraphNet,
    framework.ReversibleSequential: ReversibleSequential,
    framework.SequenceINN: SequenceINN,
}
_NO_ARITHMETIC = (modules.Concat, modules.Flatten, modules.Reshape, modules.Split)


def match(module: nn.Module) -> Match | None:
    """What takes the place of ``module``; None: it is not FrEIA's."""
    if not isinstance(module, modules.InvertibleModule):
        return None
    found = match_exactly(module, {**_LAYERS, **_CONTAINERS})
    if found is None:
        return None if type(module) in _NO_ARITHMETIC else Match(None, "there is no fused layer for it")
    if found.fast is None:
        return found
    reason = found.fast.unfit(module)
    if not reason and type(module) in _CONTAINERS and not any(map(_runs_fused, module.module_list)):
        reason = "none of its layers runs fused"
    return Match(None, reason) if reason else found._replace(calls=found.fast.networks(module))


def _runs_fused(layer: nn.Module) -> bool:
    return isinstance(layer, FusedLayer) or (type(layer) in _LAYERS and match(layer).fast is not None)
