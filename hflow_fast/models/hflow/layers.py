"""Layers of HFlow's networks: equalised learning rate, instance norm, binomial resampling.

Shapes are (B, C, H, W) unless said otherwise.
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ... import ops
from ...ops import bias_act
from ..precision import Activation, NetworkForm, activate, conv2d, convolution_adds_bias, linear

__all__ = [
    "EqualConv2d", "EqualLinear", "Equalized", "Together", "downsample", "instance_norm", "join", "keep_fine",
    "merge_residual", "upsample",
]

LEAKY_SLOPE = 0.1
NORM_EPSILON = 1e-6
_MERGE_GAIN = math.sqrt(0.5)
_LEAKY_GAIN = math.sqrt(2.0 / (1.0 + LEAKY_SLOPE**2))
_GAIN = {"leaky_relu": _LEAKY_GAIN, "tanh": 5.0 / 3.0, "linear": 1.0}


class Equalized(nn.Module):
    """Parameters stored as N(0, 1)/lr_scale and multiplied at run time by He's gain and ``lr_scale``.

    So every weight moves at the same relative rate under Adam, ``lr_scale`` times faster where asked
    (Karras et al., "Progressive Growing of GANs", ICLR 2018, §4.1).
    """

    effective: tuple[Tensor, Tensor] | None = None
    """Scaled weight and bias, while :class:`~.effective.EffectiveWeights` provides them."""
    form = NetworkForm()
    """Of weight and bias as they are used; see :meth:`HFlow.set_precision`."""
    fine = False
    """Whether the layer computes in its parameters' dtype whatever the precision of networks."""

    def __init__(self, shape: tuple[int, ...], gain: float, activation: Activation, lr_scale: float,
                 zero_init: bool) -> None:
        super().__init__()
        self.activation = activation
        self.weight_scale = lr_scale * gain / math.sqrt(math.prod(shape[1:]))
        self.bias_scale = lr_scale
        weight = torch.zeros(shape) if zero_init else torch.randn(shape) / lr_scale
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(shape[0]))

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as they are used."""
        return usable(self) or (self.form.of_one(self.weight * self.weight_scale),
                                self.form.of_one(self.bias * self.bias_scale))

    def entering(self, x: Tensor) -> Tensor:
        """``x`` in the dtype in which this layer computes. Layers do it themselves; done before, it saves work."""
        return x.to(self.form.dtype or self.weight.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "effective"}

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.activation}"


class EqualConv2d(Equalized):
    """Same-size convolution with equalised learning rate, then an activation: (B, in, H, W) → (B, out, H, W).

    Args:
        lr_scale: relative learning rate of weight and bias.
        zero_init: start from zero weights, so that the layer's output is zero.
        dead_bias: the bias has no effect. It stays a parameter because the original has it: parameter counts,
            optimizer states and checkpoints correspond.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, activation: Activation = "leaky_relu",
                 lr_scale: float = 1.0, zero_init: bool = False, dead_bias: bool = False) -> None:
        shape = (out_channels, in_channels, kernel, kernel)
        super().__init__(shape, _GAIN[activation], activation, lr_scale, zero_init)
        if dead_bias:
            self.bias_scale = 0.0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output, merged with ``residual`` (see :func:`merge_residual`) if there is one."""
        return self.apply_with(*self.scaled(), x, residual)

    def apply_with(self, weight: Tensor, bias: Tensor, x: Tensor, residual: Tensor | None = None, *,
                   groups: int = 1) -> Tensor:
        """This layer's kind of convolution, with scaled weights that are given."""
        padding = weight.shape[-1] // 2
        x = x.to(weight.dtype)
        if convolution_adds_bias(x):
            if residual is None:
                return conv2d(x, weight, bias, padding, groups, self.activation, LEAKY_SLOPE)
            x, bias = conv2d(x, weight, bias, padding, groups), None
        else:
            x = conv2d(x, weight, None, padding, groups)
        gain = 1.0 if residual is None else _MERGE_GAIN
        return bias_act(x, bias, residual, activation=self.activation, slope=LEAKY_SLOPE, gain=gain)


class EqualLinear(Equalized):
    """Linear map with equalised learning rate, then an activation: (B, in) → (B, out)."""

    def __init__(self, in_features: int, out_features: int, *, activation: Activation = "leaky_relu",
                 lr_scale: float = 1.0, zero_init: bool = False) -> None:
        gain = 1.0 if activation == "linear" else _LEAKY_GAIN  # the original's tanh uses leaky ReLU's gain here
        super().__init__((out_features, in_features), gain, activation, lr_scale, zero_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_with(*self.scaled(), x)

    def apply_with(self, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        """This layer's kind of linear map, with scaled weights that are given."""
        return activate(linear(x.to(weight.dtype), weight, bias), self.activation, LEAKY_SLOPE)


def keep_fine(*modules: nn.Module) -> None:
    """From now on the layers inside compute in their parameters' dtype, whatever the precision of networks."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, Equalized):
                layer.fine = True


class Together:
    """Layers alike in all but their weights and number of outputs, run as one; their outputs follow one another.

    A module that has some keeps them in ``together``, where :class:`~.effective.EffectiveWeights` finds them.

    Args:
        own_inputs: each layer sees its own equal part of the input's channels, as if each were called on its own;
            otherwise all see all of it.
    """

    effective: tuple[Tensor, Tensor] | None = None

    def __init__(self, layers: Sequence[Equalized], own_inputs: bool = False) -> None:
        self.layers = list(layers)
        self.own_inputs = own_inputs

    def __call__(self, x: Tensor, *residual: Tensor) -> Tensor:
        weight, bias = usable(self) or join([layer.scaled() for layer in self.layers])
        groups = {"groups": len(self.layers)} if self.own_inputs else {}
        return self.layers[0].apply_with(weight, bias, x, *residual, **groups)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "effective"}


def usable(layer: Equalized | Together) -> tuple[Tensor, Tensor] | None:
    """The weights provided for ``layer``, if gradients that are wanted find their way back through them.

    They do not where another thread samples while this one trains.
    """
    effective = layer.effective
    if effective is None or effective[0].requires_grad or not torch.is_grad_enabled():
        return effective
    layers = layer.layers if isinstance(layer, Together) else [layer]
    return None if any(member.weight.requires_grad for member in layers) else effective


def join(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The weight and the bias of several layers as one."""
    if len(pairs) == 1:
        return pairs[0]
    weights, biases = zip(*pairs)
    return torch.cat(weights), torch.cat(biases)


def instance_norm(x: Tensor) -> Tensor:
    """Zero mean and unit **unbiased** variance over the pixels of each channel; over the channels of a single pixel."""
    return ops.instance_norm(x, epsilon=NORM_EPSILON)


def merge_residual(x: Tensor, y: Tensor) -> Tensor:
    """(x + y)/√2: the sum of two unit-variance tensors, at unit variance."""
    return bias_act(x, None, y, gain=_MERGE_GAIN)


def downsample(x: Tensor) -> Tensor:
    """Half size by the binomial filter [1, 3, 3, 1]/8 in each direction, edges reflected. H, W even and ≥ 2."""
    return ops.resample(x)


def upsample(x: Tensor) -> Tensor:
    """Double size by the binomial filter [1, 3, 3, 1]/4 in each direction, as the original's zero-stuffing and padding
    do: they repeat the first row and column but reflect the last. H, W ≥ 2."""
    return ops.resample(x, up=True)
