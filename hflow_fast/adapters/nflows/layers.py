"""The layers of nflows that run fused."""

from __future__ import annotations

import functools
from typing import Any, Hashable, Sequence

import torch
import torch.nn.functional as F
from nflows import transforms
from nflows.transforms.base import Transform
from torch import Tensor

from ...nn._folding import ChannelMap
from ...nn._fusion import Coupling, Evaluated, Opaque
from ...nn.reshape import squeezed, unsqueezed
from ...ops import CouplingSpec, actnorm
from .._chain import Map, Orders, Part, constant, evaluate, undone, zeros
from .._state import cache_of, is_set

__all__ = ["ActNorm", "AdditiveCouplingTransform", "AffineCouplingTransform", "Fused", "LULinear",
           "OneByOneConvolution", "Permutation", "RandomPermutation", "ReversePermutation", "SqueezeTransform"]

_LU_FEATURES = 64
"""Up to here the product L U costs less than a second pass over a batch of vectors, also in training."""


class Fused(Transform):
    """What the fast layers share. Where parts do not describe what a layer does, its stock class does it."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        """Whether :meth:`parts` are what this layer does to inputs (B, channels, …) of ``dim`` dimensions."""
        raise NotImplementedError

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        """What a direction consists of, in order of evaluation; ``inverse``: latent → data."""
        raise NotImplementedError

    def channels_after(self, channels: int, inverse: bool) -> int:
        """How many there are behind it."""
        return channels

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Evaluated:
        if inputs.dim() < 2 or not self.fuses(inputs.dim(), inputs.shape[1], inputs.dtype, False):
            return super().forward(inputs, context)
        return evaluate(self.parts(False, context), inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Evaluated:
        if inputs.dim() < 2 or not self.fuses(inputs.dim(), inputs.shape[1], inputs.dtype, True):
            return super().inverse(inputs, context)
        return evaluate(self.parts(True, context), inputs)


class ActNorm(Fused, transforms.ActNorm):
    """z = e^log_scale · x + shift per channel."""

    mixes = False

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        # The stock class spreads a single feature over many channels.
        return dim in (2, 4) and channels == self.map_channels() and _keeps(dtype, self.log_scale)

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        if not inverse and self.training and not is_set(self, "initialized"):
            return [Opaque(self._initialize_and_apply)]
        return [Map(self, inverse)]

    def kind(self) -> Hashable:
        return self.map_channels(), self.log_scale.dtype, self.log_scale.device

    def map_channels(self) -> int:
        return self.log_scale.numel()

    def alone(self, x: Tensor, inverse: bool) -> Evaluated:
        return actnorm(x, self.log_scale, self.shift, inverse=inverse)

    @staticmethod
    def stacked(layers: Sequence[ActNorm], inverse: bool) -> ChannelMap:
        log_scale = torch.stack([layer.log_scale for layer in layers])
        shift = torch.stack([layer.shift for layer in layers])
        if not inverse:
            return ChannelMap(log_scale.exp(), shift, log_scale.sum(dim=1))
        scale = torch.exp(-log_scale.double())
        return ChannelMap(scale, -shift * scale, -log_scale.sum(dim=1))

    def _initialize_and_apply(self, inputs: Tensor) -> Evaluated:
        self._initialize(inputs)
        return self.alone(inputs, False)


class LULinear(Fused, transforms.LULinear):
    """z = L U x + bias, for vectors.

    With ``using_cache``, in eval mode and while gradients are off, what is made of the weights is kept until they
    change; nflows keeps it until the next ``train()``.
    """

    mixes = True

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        small = self.features <= _LU_FEATURES or not torch.is_grad_enabled()
        return dim == 2 and channels == self.features and small and _keeps(dtype, self.bias)

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        return [Map(self, inverse)]

    def kind(self) -> Hashable:
        return self.features, self.eps, self.bias.dtype, self.bias.device

    def map_channels(self) -> int:
        return self.features

    def tensors(self) -> Sequence[Tensor]:
        """What the map depends on."""
        return self.lower_entries, self.upper_entries, self.unconstrained_upper_diag, self.bias

    @classmethod
    def stacked(cls, layers: Sequence[LULinear], inverse: bool) -> ChannelMap:
        if not all(layer.using_cache and not layer.training for layer in layers):
            return cls._assembled(layers, inverse)
        tensors = [tensor for layer in layers for tensor in layer.tensors()]
        return cache_of(layers[0]).get((inverse, len(layers)), tensors, lambda: cls._assembled(layers, inverse))

    @classmethod
    def _assembled(cls, layers: Sequence[LULinear], inverse: bool) -> ChannelMap:
        first = layers[0]
        lower_entries, upper_entries, diagonal, bias = (
            torch.stack(tensors) for tensors in zip(*(layer.tensors()[:4] for layer in layers)))
        diagonal = F.softplus(diagonal) + first.eps
        features, device = first.features, bias.device
        lower, upper = bias.new_zeros(2, len(layers), features * features).unbind()
        lower_places, upper_places, diagonal_places = _places(features, device)
        lower = lower.index_copy(1, lower_places, lower_entries).index_fill(1, diagonal_places, 1)
        upper = upper.index_copy(1, upper_places, upper_entries).index_copy(1, diagonal_places, diagonal)
        weight = lower.view(-1, features, features) @ cls._permuted(upper.view(-1, features, features), layers)
        maps = ChannelMap(weight, bias, diagonal.log().sum(dim=1))
        return undone(maps, type(first).__name__) if inverse else maps

    @staticmethod
    def _permuted(upper: Tensor, layers: Sequence[LULinear]) -> Tensor:
        return upper


class OneByOneConvolution(LULinear, transforms.OneByOneConvolution):
    """z = L U P x + bias per pixel, with a fixed permutation P."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        return dim == 4 and channels == self.features and _keeps(dtype, self.bias)

    def tensors(self) -> Sequence[Tensor]:
        return *super().tensors(), self.permutation._permutation

    @staticmethod
    def _permuted(upper: Tensor, layers: Sequence[OneByOneConvolution]) -> Tensor:
        columns = torch.argsort(torch.stack([layer.permutation._permutation for layer in layers]), dim=1)
        return upper.gather(2, columns[:, None].expand_as(upper))


@constant
def _places(features: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the entries of L, those of U and the diagonal stand in a flattened matrix."""
    lower, upper = (rows * features + columns for rows, columns in (
        torch.tril_indices(features, features, -1), torch.triu_indices(features, features, 1)))
    return lower.to(device), upper.to(device), torch.arange(features, device=device) * (features + 1)


class _Ordered(Fused):
    """A layer with a fixed permutation of channels in its buffers, which are looked at once."""

    def plan(self) -> Orders:
        found = vars(self).get("_fused_plan")
        if found is None:
            found = vars(self)["_fused_plan"] = Orders(tuple(self.order().tolist()))
        return found

    def order(self) -> Tensor:
        """Which channel each one of the permuted ones is."""
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        vars(self).pop("_fused_plan", None)


class AffineCouplingTransform(_Ordered, transforms.AffineCouplingTransform):
    """z = x · (σ(s + 2) + 10⁻³) + t for the features of a mask that covers half of them."""

    scale_map = "sigmoid_floor"

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        return dim in (2, 4) and channels == self.features and dtype.is_floating_point

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        passive = self.num_identity_features
        spec = _spec(self.scale_map, "channels" if passive == self.features // 2 else "channels_ceil")
        raw = lambda x: self.transform_net(x[:, :passive], context)  # noqa: E731
        return [self.plan().forward, Coupling(raw, spec, inverse), self.plan().inverse]

    def order(self) -> Tensor:
        return torch.cat([self.identity_features, self.transform_features])


class AdditiveCouplingTransform(AffineCouplingTransform, transforms.AdditiveCouplingTransform):
    """z = x + t for the features of a mask that covers half of them."""

    scale_map = "none"


@functools.cache
def _spec(scale_map: str, active: str) -> CouplingSpec:
    return CouplingSpec(scale_map, shift_first=True, active=active)


class Permutation(_Ordered, transforms.Permutation):
    """A permutation of channels, which disappears in what stands beside it."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        return self._dim == 1 and channels == self._permutation.numel() and dtype.is_floating_point

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        return [self.plan().inverse if inverse else self.plan().forward]

    def order(self) -> Tensor:
        return self._permutation


class RandomPermutation(Permutation, transforms.RandomPermutation):
    """A random permutation of channels."""


class ReversePermutation(Permutation, transforms.ReversePermutation):
    """Channels in reverse order."""


class SqueezeTransform(Fused, transforms.SqueezeTransform):
    """(B, C, H, W) → (B, C·f², H/f, W/f), channel c·f² + dy·f + dx."""

    def fuses(self, dim: int, channels: int, dtype: torch.dtype, inverse: bool) -> bool:
        whole = not inverse or (channels % 4 == 0 and channels % self.factor**2 == 0)
        return dim == 4 and whole and dtype.is_floating_point

    def channels_after(self, channels: int, inverse: bool) -> int:
        return channels // self.factor**2 if inverse else channels * self.factor**2

    def parts(self, inverse: bool, context: Tensor | None) -> list[Part]:
        return [Opaque(self._unsqueezed if inverse else self._squeezed)]

    def _squeezed(self, x: Tensor) -> Evaluated:
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            return transforms.SqueezeTransform.forward(self, x)  # which says what is wrong
        return squeezed(x, self.factor), zeros(x)

    def _unsqueezed(self, x: Tensor) -> Evaluated:
        return unsqueezed(x, self.factor), zeros(x)


def _keeps(dtype: torch.dtype, parameter: Tensor) -> bool:
    """Whether what comes of both has the dtype of the flow variable."""
    return torch.promote_types(dtype, parameter.dtype) == dtype
