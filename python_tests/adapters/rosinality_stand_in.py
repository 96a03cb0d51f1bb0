"""Layers with the names, structure and interface of rosinality/glow-pytorch, written for these tests."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8


class ActNorm(nn.Module):
    def __init__(self, in_channel: int, logdet: bool = True) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, in_channel, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, in_channel, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))
        self.logdet = logdet

    def forward(self, input: Tensor):
        if not self.initialized:
            with torch.no_grad():
                std, mean = torch.std_mean(input, (0, 2, 3), keepdim=True)
                self.loc.copy_(-mean)
                self.scale.copy_((std + 1e-6).reciprocal())
                self.initialized.fill_(1)
        out = (input + self.loc) * self.scale
        pixels = input.shape[2] * input.shape[3]
        return (out, pixels * self.scale.abs().log().sum()) if self.logdet else out

    def reverse(self, output: Tensor) -> Tensor:
        return output / self.scale - self.loc


class InvConv2d(nn.Module):
    def __init__(self, in_channel: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(in_channel, in_channel))[0]
        self.weight = nn.Parameter(rotation[:, :, None, None])

    def forward(self, input: Tensor):
        log_det = torch.linalg.slogdet(self.weight[:, :, 0, 0])[1]
        return F.conv2d(input, self.weight), input.shape[2] * input.shape[3] * log_det

    def reverse(self, output: Tensor) -> Tensor:
        return F.conv2d(output, torch.linalg.inv(self.weight[:, :, 0, 0])[:, :, None, None])


class InvConv2dLU(nn.Module):
    def __init__(self, in_channel: int) -> None:
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(in_channel, in_channel))[0])
        diagonal = upper.diagonal().clone()
        strictly = torch.ones_like(upper).triu(1)
        for name, value in (("w_p", permutation), ("u_mask", strictly), ("l_mask", strictly.T.clone()),
                            ("s_sign", diagonal.sign()), ("l_eye", torch.eye(in_channel))):
            self.register_buffer(name, value)
        self.w_l = nn.Parameter(lower)
        self.w_s = nn.Parameter(diagonal.abs().log())
        self.w_u = nn.Parameter(upper.triu(1))

    def calc_weight(self) -> Tensor:
        lower = self.l_eye + self.l_mask * self.w_l
        upper = torch.diag(self.w_s.exp() * self.s_sign) + self.u_mask * self.w_u
        return (self.w_p @ lower @ upper)[:, :, None, None]

    def forward(self, input: Tensor):
        return F.conv2d(input, self.calc_weight()), input.shape[2] * input.shape[3] * self.w_s.sum()

    def reverse(self, output: Tensor) -> Tensor:
        return F.conv2d(output, torch.linalg.inv(self.calc_weight()[:, :, 0, 0])[:, :, None, None])


class ZeroConv2d(nn.Module):
    def __init__(self, in_channel: int, out_channel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channel, out_channel, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.scale = nn.Parameter(torch.zeros(1, out_channel, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        return torch.exp(3 * self.scale) * self.conv(F.pad(input, (1, 1, 1, 1), value=1.0))


class AffineCoupling(nn.Module):
    def __init__(self, in_channel: int, filter_size: int = WIDTH, affine: bool = True) -> None:
        super().__init__()
        self.affine = affine
        self.net = nn.Sequential(
            nn.Conv2d(in_channel // 2, filter_size, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(filter_size, filter_size, 1), nn.ReLU(inplace=True),
            ZeroConv2d(filter_size, in_channel if affine else in_channel // 2))

    def scale_and_shift(self, passive: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.net(passive).chunk(2, 1)
        return torch.sigmoid(log_scale + 2), shift

    def forward(self, input: Tensor):
        passive, active = input.chunk(2, 1)
        if not self.affine:
            return torch.cat([passive, active + self.net(passive)], 1), None
        scale, shift = self.scale_and_shift(passive)
        return torch.cat([passive, (active + shift) * scale], 1), scale.log().flatten(1).sum(1)

    def reverse(self, output: Tensor) -> Tensor:
        passive, active = output.chunk(2, 1)
        if not self.affine:
            return torch.cat([passive, active - self.net(passive)], 1)
        scale, shift = self.scale_and_shift(passive)
        return torch.cat([passive, active / scale - shift], 1)


class Flow(nn.Module):
    def __init__(self, in_channel: int, affine: bool = True, conv_lu: bool = True) -> None:
        super().__init__()
        self.actnorm = ActNorm(in_channel)
        self.invconv = InvConv2dLU(in_channel) if conv_lu else InvConv2d(in_channel)
        self.coupling = AffineCoupling(in_channel, affine=affine)

    def forward(self, input: Tensor):
        total = 0
        for layer in (self.actnorm, self.invconv, self.coupling):
            input, log_det = layer(input)
            total = total if log_det is None else total + log_det
        return input, total

    def reverse(self, output: Tensor) -> Tensor:
        for layer in (self.coupling, self.invconv, self.actnorm):
            output = layer.reverse(output)
        return output


def log_normal(z: Tensor, parameters: Tensor) -> Tensor:
    mean, log_std = parameters.chunk(2, 1)
    densities = -0.5 * math.log(2 * math.pi) - log_std - 0.5 * ((z - mean) / log_std.exp()) ** 2
    return densities.flatten(1).sum(1)


class Block(nn.Module):
    def __init__(self, in_channel: int, n_flow: int, split: bool = True, affine: bool = True,
                 conv_lu: bool = True) -> None:
        super().__init__()
        self.flows = nn.ModuleList(Flow(4 * in_channel, affine, conv_lu) for _ in range(n_flow))
        self.split = split
        self.prior = ZeroConv2d(2 * in_channel, 4 * in_channel) if split else ZeroConv2d(4 * in_channel, 8 * in_channel)

    def forward(self, input: Tensor):
        out, total = F.pixel_unshuffle(input, 2), 0
        for flow in self.flows:
            out, log_det = flow(out)
            total = total + log_det
        if self.split:
            out, z = out.chunk(2, 1)
            return out, total, log_normal(z, self.prior(out)), z
        return out, total, log_normal(out, self.prior(torch.zeros_like(out))), out

    def reverse(self, output: Tensor, eps: Tensor | None = None, reconstruct: bool = False) -> Tensor:
        z = eps
        if not reconstruct:
            mean, log_std = self.prior(output if self.split else torch.zeros_like(output)).chunk(2, 1)
            z = mean + eps * log_std.exp()
        out = torch.cat([output, z], 1) if self.split else z
        for flow in reversed(self.flows):
            out = flow.reverse(out)
        return F.pixel_shuffle(out, 2)


class Glow(nn.Module):
    def __init__(self, in_channel: int, n_flow: int, n_block: int, affine: bool = True, conv_lu: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(in_channel * 2**level, n_flow, level < n_block - 1, affine, conv_lu) for level in range(n_block))

    def forward(self, input: Tensor):
        log_p, total, latents = 0, 0, []
        for block in self.blocks:
            input, log_det, term, z = block(input)
            log_p, total = log_p + term, total + log_det
            latents.append(z)
        return log_p, total, latents

    def reverse(self, z_list: list[Tensor], reconstruct: bool = False) -> Tensor:
        out = z_list[-1]
        for block, z in zip(reversed(self.blocks), reversed(z_list)):
            out = block.reverse(out, z, reconstruct=reconstruct)
        return out
