"""The networks inside the couplings, and the convolutions of which they and the priors are made.

Every convolution ends in an activation norm y = (x + bias)·e^(3·logs), whose parameters come from data, or start at
zero behind weights that are zero. Folded into the convolution it costs nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._data_init import channel_statistics
from ...ops import bias_act
from ..precision import Activation, activate, conv2d, convolution_adds_bias
from .folding import Folding

__all__ = [
    "LOGS_FACTOR", "ConvStack", "CouplingNetworks", "convolve", "coupling_network", "on_padding", "padding_frame",
    "padding_taps",
]

LOGS_FACTOR = 3.0
"""Scales are e^(3·logs): so they learn three times as fast under Adam (openai/glow)."""
_WEIGHT_STD = 0.05


class ConvStack(Folding):
    """Same-size convolutions of one shape, with activation norms behind them: one for each step of a level.

    The edge bias is a further input channel, the last one, that is 1 on the padding and 0 inside. There are two ways to
    the same result: to run the convolution with that channel, which is cheap for few input channels, or to add what it
    contributes, a map of the output that does not depend on the data, which is cheap for few output channels.

    Args:
        count: N, convolutions.
        channels: of input and output.
        kernel: 1 or 3.
        resolution: R, height and width of the images.
        edge: "input" or "output": where the edge bias is added; None: there is none.
        zero_init: start from zero weights; data does not initialise the norm.
    """

    def __init__(self, count: int, channels: tuple[int, int], kernel: int, resolution: int, *,
                 edge: Literal["input", "output"] | None = None, zero_init: bool = False) -> None:
        super().__init__()
        in_channels, out_channels = channels
        self.edge = edge
        shape = count * out_channels, in_channels + (edge is not None), kernel, kernel
        # Stacked in the first dimension, so that the memory formats of four dimensions apply.
        self.weight = nn.Parameter(torch.zeros(shape) if zero_init else _WEIGHT_STD * torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(count, out_channels))
        self.logs = nn.Parameter(torch.zeros(count, out_channels))
        self.register_buffer("frame", None if edge is None else padding_frame(resolution), persistent=False)
        self.register_buffer("taps", padding_taps(resolution) if edge == "output" else None, persistent=False)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weights (N·out, in, k, k) and biases, (N, out) or, with the edge bias in them, (N, out, R, R)."""
        scale = torch.exp(LOGS_FACTOR * self.logs)
        of_weight = scale.view(-1, 1, 1, 1)
        if self.edge != "output":
            return self.weight * of_weight, self.bias * scale
        edge = on_padding(self.weight[:, -1], self.taps).unflatten(0, self.bias.shape)
        return self.weight[:, :-1] * of_weight, (self.bias[:, :, None, None] + edge) * scale[:, :, None, None]

    def in_form(self, folded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """In the networks' dtype and memory format."""
        return tuple(self.form.of_one(tensor) for tensor in folded)

    def each(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every convolution, for :func:`convolve`."""
        weight, bias = self.folded()
        return list(zip(weight.unflatten(0, self.bias.shape).unbind(), bias.unbind()))

    @torch.no_grad()
    def initialize_one(self, index: int, x: Tensor) -> Tensor:
        """Sets norm ``index`` so that its output has zero mean and unit std per channel; returns that output."""
        y = self._convolve_one(index, x)
        mean, log_std = channel_statistics(y, correction=0)
        self.bias[index], self.logs[index] = -mean, -log_std / LOGS_FACTOR
        return self._normalize_one(index, y)

    @torch.no_grad()
    def apply_one(self, index: int, x: Tensor) -> Tensor:
        """Convolution and norm ``index``."""
        return self._normalize_one(index, self._convolve_one(index, x))

    def _convolve_one(self, index: int, x: Tensor) -> Tensor:
        return convolve(x, self.weight.unflatten(0, self.bias.shape)[index], None, self.frame)

    def _normalize_one(self, index: int, y: Tensor) -> Tensor:
        bias, scale = self.bias[index], torch.exp(LOGS_FACTOR * self.logs[index])
        return (y + bias[:, None, None]) * scale[:, None, None]


class CouplingNetworks(nn.Module):
    """One network per step: 3 × 3 → ReLU → 1 × 1 → ReLU → 3 × 3, the last one zero at the start.

    Args:
        count: steps.
        channels: of its input, and of the raw parameters it returns.
    """

    def __init__(self, count: int, channels: tuple[int, int], width: int, resolution: int, edge_bias: bool) -> None:
        super().__init__()
        in_channels, out_channels = channels
        self.first = ConvStack(count, (in_channels, width), 3, resolution, edge="input" if edge_bias else None)
        self.second = ConvStack(count, (width, width), 1, resolution)
        self.last = ConvStack(count, (width, out_channels), 3, resolution, edge="output" if edge_bias else None,
                              zero_init=True)

    def each(self) -> list[tuple[Tensor | None, ...]]:
        """What :func:`coupling_network` takes beside its input, for every step."""
        stacks = zip(self.first.each(), self.second.each(), self.last.each())
        return [(self.first.frame, *first, *second, *last) for first, second, last in stacks]

    @torch.no_grad()
    def initialize_one(self, index: int, x: Tensor) -> Tensor:
        """Sets the norms of step ``index`` from its input ``x`` (B, in, R, R); returns the network's output."""
        x = torch.relu_(self.first.initialize_one(index, x))
        x = torch.relu_(self.second.initialize_one(index, x))
        return self.last.apply_one(index, x)


def coupling_network(x: Tensor, frame: Tensor | None, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
                     weight3: Tensor, bias3: Tensor) -> Tensor:
    """One of :class:`CouplingNetworks`: (B, in, R, R) → (B, out, R, R)."""
    x = _rectified(x.to(weight1.dtype), weight1, bias1, frame)
    return convolve(_rectified(x, weight2, bias2), weight3, bias3)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, frame: Tensor | None = None,
             activation: Activation = "linear") -> Tensor:
    """A same-size convolution and an activation.

    Args:
        bias: (out,) or (out, R, R).
        frame: (1, 1, R + 2, R + 2): the weights' last input channel.
    """
    padding = weight.shape[-1] // 2
    if frame is not None:
        frame = frame.to(x.dtype).expand(x.shape[0], -1, -1, -1)
        x, padding = torch.cat([F.pad(x, (1, 1, 1, 1)), frame], dim=1), 0
    if bias is None or bias.dim() == 1:
        return conv2d(x, weight, bias, padding, activation=activation)
    return activate(conv2d(x, weight, None, padding).add_(bias), activation)


def padding_frame(resolution: int) -> Tensor:
    """The edge bias's channel: 1 on the padding of an image, 0 inside; (1, 1, R + 2, R + 2)."""
    return F.pad(torch.zeros(1, 1, resolution, resolution), (1, 1, 1, 1), value=1.0)


def padding_taps(resolution: int) -> Tensor:
    """Which elements of a 3 × 3 kernel lie on the padding, for every pixel: (9, R, R)."""
    return F.unfold(padding_frame(resolution), 3).view(9, resolution, resolution)


def on_padding(kernels: Tensor, taps: Tensor) -> Tensor:
    """What kernels (N, 3, 3) make of the edge bias's channel: (N, R, R)."""
    return torch.tensordot(kernels.flatten(1), taps, dims=1)


def _rectified(x: Tensor, weight: Tensor, bias: Tensor, frame: Tensor | None = None) -> Tensor:
    """A convolution and a ReLU."""
    if convolution_adds_bias(x):
        return convolve(x, weight, bias, frame, activation="relu")
    return bias_act(convolve(x, weight, None, frame), bias, activation="leaky_relu", slope=0.0)
