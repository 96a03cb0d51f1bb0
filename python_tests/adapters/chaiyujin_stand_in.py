"""Layers with the names, structure and interface of chaiyujin/glow-pytorch, written for these tests."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def added(total: Tensor | float | None, term: Tensor) -> Tensor | None:
    return None if total is None else total + term


class _ActNorm(nn.Module):
    def __init__(self, num_features: int, scale: float = 1.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.num_features, self.scale, self.inited = num_features, scale, False

    def initialize_parameters(self, input: Tensor) -> None:
        if self.training:
            with torch.no_grad():
                var, mean = torch.var_mean(input, (0, 2, 3), correction=0, keepdim=True)
                self.bias.copy_(-mean)
                self.logs.copy_(torch.log(self.scale / (var.sqrt() + 1e-6)))
            self.inited = True

    def forward(self, input: Tensor, logdet=None, reverse: bool = False):
        if not self.inited:
            self.initialize_parameters(input)
        self._check_input_dim(input)
        term = pixels(input) * self.logs.sum()
        if reverse:
            return input * torch.exp(-self.logs) - self.bias, added(logdet, -term)
        return (input + self.bias) * torch.exp(self.logs), added(logdet, term)


class ActNorm2d(_ActNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() == 4 and input.shape[1] == self.num_features, "a wrong shape"


class Conv2d(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, kernel: int, actnorm: type[nn.Module]) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.do_actnorm = True
        self.actnorm = actnorm(outputs)

    def forward(self, input: Tensor) -> Tensor:
        return self.actnorm(super().forward(input))[0]


class Conv2dZeros(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.logs = nn.Parameter(torch.zeros(outputs, 1, 1))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.exp(3 * self.logs)


class Permute2d(nn.Module):
    def __init__(self, num_channels: int, shuffle: bool) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.indices = np.random.permutation(num_channels) if shuffle else np.arange(num_channels)[::-1].copy()
        self.indices_inverse = np.argsort(self.indices)

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor:
        return input[:, self.indices_inverse if reverse else self.indices]


class InvertibleConv1x1(nn.Module):
    def __init__(self, num_channels: int, LU_decomposed: bool = False) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(num_channels, num_channels))[0]
        self.w_shape, self.LU = [num_channels, num_channels], LU_decomposed
        if not LU_decomposed:
            self.weight = nn.Parameter(rotation)
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("p", permutation)
        self.register_buffer("sign_s", upper.diagonal().sign())
        self.l, self.u = nn.Parameter(lower), nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(upper.diagonal().abs().log())
        self.l_mask, self.eye = torch.ones_like(lower).tril(-1), torch.eye(num_channels)

    def matrix(self) -> tuple[Tensor, Tensor]:
        if not self.LU:
            return self.weight, torch.linalg.slogdet(self.weight)[1]
        lower = self.l * self.l_mask + self.eye
        upper = self.u * self.l_mask.T + torch.diag(self.sign_s * self.log_s.exp())
        return self.p @ lower @ upper, self.log_s.sum()

    def forward(self, input: Tensor, logdet=None, reverse: bool = False):
        weight, term = self.matrix()
        if reverse:
            weight, term = torch.linalg.inv(weight), -term
        return F.conv2d(input, weight[:, :, None, None]), added(logdet, pixels(input) * term)


class FlowStep(nn.Module):
    def __init__(self, in_channels: int, hidden_channels: int, flow_permutation: str = "invconv",
                 flow_coupling: str = "additive", LU_decomposed: bool = False) -> None:
        super().__init__()
        self.flow_permutation, self.flow_coupling = flow_permutation, flow_coupling
        self.actnorm = ActNorm2d(in_channels)
        if flow_permutation == "invconv":
            self.invconv = InvertibleConv1x1(in_channels, LU_decomposed)
        elif flow_permutation == "shuffle":
            self.shuffle = Permute2d(in_channels, True)
        else:
            self.reverse = Permute2d(in_channels, False)
        outputs = in_channels if flow_coupling == "affine" else in_channels // 2
        self.f = nn.Sequential(Conv2d(in_channels // 2, hidden_channels, 3, ActNorm2d), nn.ReLU(),
                               Conv2d(hidden_channels, hidden_channels, 1, ActNorm2d), nn.ReLU(),
                               Conv2dZeros(hidden_channels, outputs))

    def permuted(self, z: Tensor, logdet, reverse: bool):
        if self.flow_permutation == "invconv":
            return self.invconv(z, logdet, reverse)
        return getattr(self, self.flow_permutation)(z, reverse), logdet

    def forward(self, input: Tensor, logdet=None, reverse: bool = False):
        return self.reverse_flow(input, logdet) if reverse else self.normal_flow(input, logdet)

    def normal_flow(self, input: Tensor, logdet):
        z, logdet = self.permuted(*self.actnorm(input, logdet=logdet), False)
        passive, active = z.chunk(2, 1)
        raw = self.f(passive)
        if self.flow_coupling == "additive":
            return torch.cat([passive, active + raw], 1), logdet
        scale = torch.sigmoid(raw[:, 1::2] + 2)
        return torch.cat([passive, (active + raw[:, 0::2]) * scale], 1), logdet + scale.log().sum((1, 2, 3))

    def reverse_flow(self, input: Tensor, logdet):
        passive, active = input.chunk(2, 1)
        raw = self.f(passive)
        if self.flow_coupling == "additive":
            active = active - raw
        else:
            scale = torch.sigmoid(raw[:, 1::2] + 2)
            active, logdet = active / scale - raw[:, 0::2], logdet - scale.log().sum((1, 2, 3))
        z, logdet = self.permuted(torch.cat([passive, active], 1), logdet, True)
        return self.actnorm(z, logdet=logdet, reverse=True)


class SqueezeLayer(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, input: Tensor, logdet=None, reverse: bool = False):
        return (F.pixel_shuffle if reverse else F.pixel_unshuffle)(input, self.factor), logdet


class Split2d(nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = Conv2dZeros(num_channels // 2, num_channels)

    def split2d_prior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.conv(z)
        return raw[:, 0::2], raw[:, 1::2]

    def forward(self, input: Tensor, logdet=0.0, reverse: bool = False, eps_std=None):
        if reverse:
            mean, logs = self.split2d_prior(input)
            return torch.cat([input, mean + logs.exp() * torch.randn_like(mean) * (eps_std or 1)], 1), logdet
        going_on, leaving = input.chunk(2, 1)
        mean, logs = self.split2d_prior(going_on)
        densities = -0.5 * (2 * logs + (leaving - mean) ** 2 * torch.exp(-2 * logs) + math.log(2 * math.pi))
        return going_on, logdet + densities.sum((1, 2, 3))


class FlowNet(nn.Module):
    def __init__(self, image_shape: tuple[int, int, int], hidden_channels: int, K: int, L: int,
                 flow_permutation: str = "invconv", flow_coupling: str = "affine", LU_decomposed: bool = True) -> None:
        super().__init__()
        channels = image_shape[2]
        self.layers = nn.ModuleList()
        for level in range(L):
            channels *= 4
            self.layers.append(SqueezeLayer(2))
            self.layers.extend(FlowStep(channels, hidden_channels, flow_permutation, flow_coupling, LU_decomposed)
                               for _ in range(K))
            if level < L - 1:
                self.layers.append(Split2d(channels))
                channels //= 2

    def forward(self, input: Tensor, logdet=0.0, reverse: bool = False, eps_std=None):
        return self.decode(input, eps_std) if reverse else self.encode(input, logdet)

    def encode(self, z: Tensor, logdet=0.0):
        for layer in self.layers:
            z, logdet = layer(z, logdet, reverse=False)
        return z, logdet

    def decode(self, z: Tensor, eps_std=None) -> Tensor:
        for layer in reversed(self.layers):
            options = {"eps_std": eps_std} if isinstance(layer, Split2d) else {}
            z, _ = layer(z, logdet=0, reverse=True, **options)
        return z
