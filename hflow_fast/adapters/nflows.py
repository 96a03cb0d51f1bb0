"""Fast classes for nflows 0.14.

Each is a subclass of the class of nflows it is named after, with its constructor, parameters, buffers and state_dict.
``forward`` is data → latent, as in nflows. What they are made of is described by parts
(:mod:`hflow_fast.adapters._folding`), so that :class:`CompositeTransform` runs all that stands between two coupling
networks in one pass, in both directions: actnorms, 1 × 1 convolutions, permutations, and the permutations that bring
the channels of a coupling's mask side by side. ``InverseTransform`` and ``MultiscaleCompositeTransform`` stay as they
are and call fast layers; the former is seen through.
"""

from __future__ import annotations

import functools
from typing import Any, Iterator

import torch
from nflows import transforms
from nflows.transforms.base import Transform
from torch import Tensor, nn

from ..nn._fusion import ChannelMap, Coupling, Evaluated, Opaque, run
from ..nn._inversion import invert
from ..ops import CouplingSpec, actnorm
from ._folding import Part, Shuffle, affine_of_inverse, folding_of, without_autocast
from ._state import cache_of, is_set
from .accelerate import match_exactly, stock_class
from .report import Match

__all__ = ["ActNorm", "AdditiveCouplingTransform", "AffineCouplingTransform", "CompositeTransform", "LULinear",
           "OneByOneConvolution", "Permutation", "RandomPermutation", "ReversePermutation", "SqueezeTransform", "match"]

_LU_FEATURES = 64
"""Up to here the product L·U costs less than a second pass over the batch, also in training."""


def match(module: nn.Module) -> Match | None:
    """What to do with ``module`` where it is a transform of nflows; see :func:`hflow_fast.adapters.accelerate`."""
    found = match_exactly(module, _FAST)
    if found is None:
        if isinstance(module, Transform) and stock_class(module) is None and type(module) not in _TRANSPARENT:
            return Match(None, "has no fused form")
        return None
    if found.fast is None:
        return found
    if isinstance(module, transforms.CompositeTransform):
        return Match(CompositeTransform, calls=tuple(module._transforms)) if _worth_fusing(module) else None
    reason = _obstacle(module)
    if reason is not None:
        return Match(None, reason)
    if isinstance(module, transforms.AffineCouplingTransform):
        return found._replace(calls=(module.transform_net,))
    return found


def _worth_fusing(module: nn.Module) -> bool:
    """Whether a layer with a fast class is among the steps of a composite."""
    for step, _ in _steps(module, False):
        found = match(step)
        if isinstance(step, _Fused) or (found is not None and found.fast is not None):
            return True
    return False


def _obstacle(module: nn.Module) -> str | None:
    """Why a layer of a known class cannot be a fast one."""
    if (isinstance(module, transforms.ActNorm) and module.training and not module.initialized.is_meta
            and not module.initialized):
        return "is not yet initialised from data; run a batch through the model in train mode, then accelerate it again"
    if isinstance(module, transforms.Permutation) and module._dim != 1:
        return f"permutes dimension {module._dim}, not channels"
    if not isinstance(module, transforms.AffineCouplingTransform):
        return None
    if module.unconditional_transform is not None:
        return "has an unconditional transform"
    active, passive = module.num_transform_features, module.num_identity_features
    if not active or not passive or abs(active - passive) > 1:
        return f"its mask transforms {active} of {module.features} features; there are kernels for halves only"
    # Releases after 0.14 take it as an argument; before, it is the default.
    default = getattr(transforms.AffineCouplingTransform, "DEFAULT_SCALE_ACTIVATION", None)
    if getattr(module, "scale_activation", default) is not default:
        return "its scale_activation is not the default one, σ(s + 2) + 10⁻³"
    return None


class _Fused(Transform):
    """What the fast layers share. Where a layer does not take inputs for what it fuses, its stock class does the rest."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        """Whether :meth:`parts` are what this layer does to inputs (B, channels, …) of ``dim`` dimensions."""
        raise NotImplementedError

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        """What one direction of this layer does, in order; ``inverse``: latent → data."""
        raise NotImplementedError

    def channels_after(self, channels: int, inverse: bool) -> int:
        return channels

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Evaluated:
        if inputs.dim() < 2 or not self.fuses(inputs.dim(), inputs.shape[1], inputs.dtype, False):
            return super().forward(inputs, context)
        return _run(self, "forward", inputs, [(self, False)], context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Evaluated:
        if inputs.dim() < 2 or not self.fuses(inputs.dim(), inputs.shape[1], inputs.dtype, True):
            return super().inverse(inputs, context)
        return _run(self, "inverse", inputs, [(self, True)], context)


class ActNorm(_Fused, transforms.ActNorm):
    """z = e^log_scale · x + shift per channel."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        return dim in (2, 4) and channels == self.log_scale.numel() and _keeps(dtype, self.log_scale)

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        if not inverse and self.training and not is_set(self, "initialized"):
            return [Opaque(self._initialize_and_apply)]
        tensors = [self.log_scale, self.shift]
        return [cache_of(self).get(f"map {inverse}", tensors, functools.partial(self._map, inverse))]

    def _map(self, inverse: bool) -> ChannelMap:
        alone = functools.partial(actnorm, log_scale=self.log_scale, bias=self.shift, inverse=inverse)
        log_det = self.log_scale.sum()
        if not inverse:
            return ChannelMap(self.log_scale.exp(), self.shift, log_det, alone)
        scale = self.log_scale.double().neg().exp()
        return ChannelMap(scale, -self.shift.double() * scale, -log_det, alone)

    def _initialize_and_apply(self, inputs: Tensor) -> Evaluated:
        self._initialize(inputs)
        return actnorm(inputs, self.log_scale, self.shift)


class _LowerUpper(_Fused):
    """z = L U P x + bias per pixel."""

    def _permutation_tensors(self) -> list[Tensor]:
        """The one tensor of indices that P x is x at; none: it is x."""
        return []

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        tensors = [self.lower_entries, self.upper_entries, self.unconstrained_upper_diag, self.bias,
                   *self._permutation_tensors()]
        return [cache_of(self).get(f"map {inverse}", tensors, self._inverse_map if inverse else self._map)]

    def _map(self) -> ChannelMap:
        diagonal = self.upper_diag
        entries = torch.cat([_zero_and_one(self.bias.dtype, self.bias.device), self.lower_entries, diagonal,
                             self.upper_entries])
        lower, upper = entries[self._positions()].unbind()
        return ChannelMap(lower @ upper, self.bias, diagonal.log().sum())

    def _inverse_map(self) -> ChannelMap:
        weight, bias, log_det = self.parts(False, None)[0][:3]
        return affine_of_inverse(invert(weight, type(self).__name__), bias, log_det)

    def _positions(self) -> Tensor:
        """Where among 0, 1, the lower entries, the diagonal and the upper entries L and U P have their elements."""
        positions = _triangles(self.features, self.bias.device)
        permutation = self._permutation_tensors()
        if not permutation:
            return positions
        # No gradients, so that the cache keeps it in training, and no inference mode, so that it is of use there.
        with torch.inference_mode(False), torch.no_grad():
            return cache_of(self).get("positions", permutation, lambda: torch.stack(
                [positions[0], positions[1][:, torch.argsort(permutation[0])]]))


@functools.lru_cache(maxsize=64)
def _triangles(features: int, device: torch.device) -> Tensor:
    """(2, C, C): see :meth:`_LowerUpper._positions`."""
    count = features * (features - 1) // 2
    lower, upper = torch.eye(features, dtype=torch.long), torch.zeros(features, features, dtype=torch.long)
    lower[tuple(torch.tril_indices(features, features, -1))] = torch.arange(2, 2 + count)
    upper.diagonal().copy_(torch.arange(2 + count, 2 + count + features))
    upper[tuple(torch.triu_indices(features, features, 1))] = torch.arange(2 + count + features,
                                                                           2 + 2 * count + features)
    with torch.inference_mode(False):
        return torch.stack([lower, upper]).to(device)


@functools.lru_cache(maxsize=16)
def _zero_and_one(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(2, dtype=dtype, device=device)


class LULinear(_LowerUpper, transforms.LULinear):
    """z = L U x + bias, on inputs (B, C)."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        small = self.features <= _LU_FEATURES or not torch.is_grad_enabled()
        return dim == 2 and channels == self.features and small and _keeps(dtype, self.bias)


class OneByOneConvolution(_LowerUpper, transforms.OneByOneConvolution):
    """z = L U P x + bias per pixel, with a fixed permutation P. Weights are kept between calls while gradients are off,
    with ``using_cache`` or without it, and are never stale."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        return dim == 4 and channels == self.features and _keeps(dtype, self.bias)

    def _permutation_tensors(self) -> list[Tensor]:
        return [self.permutation._permutation]


class _Plan:
    """How the channels of a mask are laid out. A class of its own, as :func:`restore` removes only what is ours."""

    def __init__(self, before: Shuffle) -> None:
        self.before = before
        self.after = before.inverted


class _Ordered(_Fused):
    """A layer with a fixed permutation of channels in its buffers, read from the device once."""

    def _plan(self) -> _Plan:
        found = vars(self).get("_fused_plan")
        if found is None:
            found = vars(self)["_fused_plan"] = _Plan(Shuffle(tuple(self._order().tolist())))
        return found

    def _order(self) -> Tensor:
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        vars(self).pop("_fused_plan", None)


class AffineCouplingTransform(_Ordered, transforms.AffineCouplingTransform):
    """z = x · (σ(s + 2) + 10⁻³) + t for the features of a mask that covers half of them."""

    _scale_map = "sigmoid_floor"

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        return dim in (2, 4) and channels == self.features and dtype.is_floating_point

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        passive = self.num_identity_features
        active = "channels" if passive == self.features // 2 else "channels_ceil"
        plan = self._plan()
        return [plan.before,
                Coupling(lambda x: self.transform_net(x[:, :passive], context), _spec(self._scale_map, active), inverse),
                plan.after]

    def _order(self) -> Tensor:
        return torch.cat([self.identity_features, self.transform_features])


class AdditiveCouplingTransform(AffineCouplingTransform, transforms.AdditiveCouplingTransform):
    """z = x + t for the features of a mask that covers half of them."""

    _scale_map = "none"


@functools.lru_cache
def _spec(scale_map: str, active: str) -> CouplingSpec:
    return CouplingSpec(scale_map, shift_first=True, active=active)


class Permutation(_Ordered, transforms.Permutation):
    """A permutation of channels."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        return self._dim == 1 and channels == self._permutation.numel() and dtype.is_floating_point

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        plan = self._plan()
        return [plan.after if inverse else plan.before]

    def _order(self) -> Tensor:
        return self._permutation


class RandomPermutation(Permutation, transforms.RandomPermutation):
    """A random permutation of channels."""


class ReversePermutation(Permutation, transforms.ReversePermutation):
    """Channels in reverse order."""


class SqueezeTransform(_Fused, transforms.SqueezeTransform):
    """(B, C, H, W) → (B, C·f², H/f, W/f), channel c·f² + dy·f + dx."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        whole = not inverse or (channels % 4 == 0 and channels % self.factor**2 == 0)
        return dim == 4 and whole and dtype.is_floating_point

    def channels_after(self, channels: int, inverse: bool) -> int:
        return channels // self.factor**2 if inverse else channels * self.factor**2

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        return [Opaque(self._unsqueeze if inverse else self._squeeze)]

    def _squeeze(self, x: Tensor) -> Evaluated:
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            return transforms.SqueezeTransform.forward(self, x)  # which says what is wrong
        return nn.functional.pixel_unshuffle(x, self.factor), _zeros(x)

    def _unsqueeze(self, x: Tensor) -> Evaluated:
        return nn.functional.pixel_shuffle(x, self.factor), _zeros(x)


class CompositeTransform(transforms.CompositeTransform):
    """Transforms one after another, neighbours fused; transforms without a fast class are called as they are."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Evaluated:
        return self._evaluate(False, inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Evaluated:
        return self._evaluate(True, inputs, context)

    def _evaluate(self, inverse: bool, inputs: Tensor, context: Tensor | None) -> Evaluated:
        steps = list(_steps(self, inverse))
        x, terms = inputs, [_zeros(inputs)]
        while steps:
            fused = _fusable(x, steps)
            if fused:
                x, term = _run(self, f"{inverse} {len(steps)}", x, fused, context)
                steps = steps[len(fused):]
            else:
                (step, backward), *steps = steps
                x, term = step.inverse(x, context) if backward else step(x, context)
            terms.append(term)
        return x, functools.reduce(torch.add, terms[1:] or terms)


Step = tuple[Transform, bool]
"""A transform, and whether its inverse is meant."""


def _steps(transform: Transform, inverse: bool) -> Iterator[Step]:
    """What a composite evaluates, in order; it looks into those that only pass on what they get."""
    if isinstance(transform, transforms.InverseTransform):
        children, inverse = [transform._transform], not inverse
    else:
        children = reversed(transform._transforms) if inverse else transform._transforms
    for child in children:
        transparent = isinstance(child, CompositeTransform) or type(child) in _TRANSPARENT
        if transparent and not _is_watched(child, inverse):
            yield from _steps(child, inverse)
        else:
            yield child, inverse


def _fusable(x: Tensor, steps: list[Step]) -> list[Step]:
    """The first of ``steps``, as many as parts can describe."""
    fused: list[Step] = []
    channels = x.shape[1] if x.dim() > 1 else 0
    for step, inverse in steps:
        if (not isinstance(step, _Fused) or _is_watched(step, inverse)
                or not step.fuses(x.dim(), channels, x.dtype, inverse)):
            break
        fused.append((step, inverse))
        channels = step.channels_after(channels, inverse)
    return fused


def _is_watched(transform: Transform, inverse: bool) -> bool:
    """Whether hooks are to be called, which :func:`accelerate` did not see; ``inverse`` calls none."""
    return not inverse and any((transform._forward_hooks, transform._forward_pre_hooks, transform._backward_hooks,
                                transform._backward_pre_hooks))


def _run(owner: nn.Module, name: str, x: Tensor, steps: list[Step], context: Tensor | None) -> Evaluated:
    """``steps`` with the maps between couplings folded; ``owner`` keeps what they fold to."""
    with without_autocast(x):
        parts = [part for step, inverse in steps for part in step.parts(inverse, context)]
    return run(folding_of(owner).fold(name, parts, x), x)


def _keeps(dtype: torch.dtype, parameter: Tensor) -> bool:
    """Whether what comes of both has the dtype of the flow variable."""
    return torch.promote_types(dtype, parameter.dtype) == dtype


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


_TRANSPARENT = (transforms.CompositeTransform, transforms.InverseTransform)
_FAST = {getattr(transforms, fast.__name__): fast for fast in (
    ActNorm, AdditiveCouplingTransform, AffineCouplingTransform, CompositeTransform, LULinear, OneByOneConvolution,
    Permutation, RandomPermutation, ReversePermutation, SqueezeTransform)}
