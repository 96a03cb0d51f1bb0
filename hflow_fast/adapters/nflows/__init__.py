"""The transforms of nflows (Durkan et al., 2020) on fused kernels.

Each fast class is a subclass of the class of nflows it is named after; ``forward`` is data → latent, as there.
:class:`CompositeTransform` runs all that stands between two coupling networks in one pass, in both directions:
actnorms, 1 × 1 convolutions, permutations, and those that bring the features of a coupling's mask side by side.
``InverseTransform`` and ``MultiscaleCompositeTransform`` stay as they are and call fast transforms; a composite looks
into the former.
"""

from __future__ import annotations

from nflows import transforms
from nflows.transforms.base import Transform
from torch import nn

from ..accelerate import match_exactly, stock_class
from ..report import Match
from .composite import CompositeTransform, steps_of
from .layers import (ActNorm, AdditiveCouplingTransform, AffineCouplingTransform, Fused, LULinear, OneByOneConvolution,
                     Permutation, RandomPermutation, ReversePermutation, SqueezeTransform)

__all__ = ["ActNorm", "AdditiveCouplingTransform", "AffineCouplingTransform", "CompositeTransform", "LULinear",
           "OneByOneConvolution", "Permutation", "RandomPermutation", "ReversePermutation", "SqueezeTransform", "match"]

_FAST: dict[type[nn.Module], type[nn.Module]] = {getattr(transforms, fast.__name__): fast for fast in (
    ActNorm, AdditiveCouplingTransform, AffineCouplingTransform, CompositeTransform, LULinear, OneByOneConvolution,
    Permutation, RandomPermutation, ReversePermutation, SqueezeTransform)}
_NO_WORK = (transforms.InverseTransform, transforms.MultiscaleCompositeTransform)
"""Nobody misses them in a report."""


def match(module: nn.Module) -> Match | None:
    """What to do with ``module``; None where it is not of nflows."""
    found = match_exactly(module, _FAST)
    if found is None:
        unknown = isinstance(module, Transform) and not isinstance(module, _NO_WORK) and stock_class(module) is None
        return Match(None, "has no fused form") if unknown else None
    if found.fast is None:
        return found
    reason = _obstacle(module)
    if reason is not None:
        return Match(None, reason)
    if isinstance(module, transforms.CompositeTransform):
        return found._replace(calls=tuple(module._transforms))
    if isinstance(module, transforms.AffineCouplingTransform):
        return found._replace(calls=(module.transform_net,))
    return found


def _obstacle(module: nn.Module) -> str | None:
    """Why a layer of a known class cannot be a fast one."""
    if isinstance(module, transforms.ActNorm) and not module.initialized.is_meta and not module.initialized:
        return "is not initialised from data yet; run one batch in train mode, then accelerate again"
    if isinstance(module, transforms.Permutation) and module._dim != 1:
        return f"permutes dimension {module._dim}, not channels"
    if isinstance(module, transforms.CompositeTransform) and not _gains(module):
        return "has no layer with a fused form"
    return _obstacle_of_coupling(module) if isinstance(module, transforms.AffineCouplingTransform) else None


def _obstacle_of_coupling(module: transforms.AffineCouplingTransform) -> str | None:
    if module.unconditional_transform is not None:
        return "has an unconditional transform"
    active, passive = module.num_transform_features, module.num_identity_features
    if not active or not passive or abs(active - passive) > 1:
        return f"its mask transforms {active} of {module.features} features, not half of them"
    # Not in 0.14, where it is always this one.
    default = getattr(transforms.AffineCouplingTransform, "DEFAULT_SCALE_ACTIVATION", None)
    if getattr(module, "scale_activation", default) is not default:
        return "its scale_activation is not the default, σ(s + 2) + 10⁻³"
    return None


def _gains(module: transforms.CompositeTransform) -> bool:
    """Whether one of its steps is fast, or can be."""
    matches = [(step, match(step)) for step, _ in steps_of(module, False)]
    return any(isinstance(step, Fused) or (found is not None and found.fast is not None) for step, found in matches)
