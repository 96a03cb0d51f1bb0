"""The assertions can fail: layers with one planted fault each, and the same layers without, which pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hflow_fast.testing import assert_invertible, assert_log_det

SHAPE = (2, 4, 3, 3)


class Affine(nn.Module):
    """z = W x·e^s per pixel; both directions cache nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.log_scale = nn.Parameter(torch.zeros(4))

    def matrix(self):
        return self.weight * self.log_scale.exp()

    def log_abs_det(self, x):
        return (torch.linalg.slogdet(self.weight).logabsdet + self.log_scale.sum()) * x[0, 0].numel()

    def forward(self, x):
        return torch.einsum("oc,bchw->bohw", self.matrix(), x), self.log_abs_det(x).expand(len(x))

    def inverse(self, z):
        x = torch.einsum("oc,bchw->bohw", torch.linalg.inv(self.matrix()), z)
        return x, -self.log_abs_det(z).expand(len(z))


class Coupling(nn.Module):
    """The second half, by a network of the first; the network ends in zeros, as Glow's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(2, 4, 3, padding=1)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def scale_and_shift(self, passive):
        return self.net(passive).tanh().chunk(2, 1)

    def forward(self, x):
        passive, active = x.chunk(2, 1)
        s, t = self.scale_and_shift(passive)
        return torch.cat([passive, active * s.exp() + t], 1), s.flatten(1).sum(1)

    def inverse(self, z):
        passive, active = z.chunk(2, 1)
        s, t = self.scale_and_shift(passive)
        return torch.cat([passive, (active - t) / s.exp()], 1), -s.flatten(1).sum(1)


# ---- One fault each, in forward or log-det ----


class WrongSign(Coupling):
    def forward(self, x):
        z, log_det = super().forward(x)
        return z, -log_det


class ForgetsThePixels(Affine):
    def log_abs_det(self, x):
        return torch.linalg.slogdet(self.weight).logabsdet + self.log_scale.sum()


class ForgetsTheScale(Affine):
    def log_abs_det(self, x):
        return torch.linalg.slogdet(self.weight).logabsdet * x[0, 0].numel()


class SharesTheLogDet(Coupling):
    def forward(self, x):
        z, log_det = super().forward(x)
        return z, log_det.mean().expand(len(x))


class MissesTheMask(Coupling):
    """A checkerboard coupling whose network sees all pixels, and changes all."""

    def forward(self, x):
        s, t = (torch.cat([u, u], 1) for u in self.scale_and_shift(x[:, :2]))
        return x * s.exp() + t, s.flatten(1).sum(1)

    def inverse(self, z):
        s, t = (torch.cat([u, u], 1) for u in self.scale_and_shift(z[:, :2]))
        return (z - t) / s.exp(), -s.flatten(1).sum(1)


class LogDetWithoutGradient(Coupling):
    def forward(self, x):
        z, log_det = super().forward(x)
        return z, log_det.detach()


class LogDetForgetsGradientOfOneTerm(Affine):
    def log_abs_det(self, x):
        return (torch.linalg.slogdet(self.weight).logabsdet + self.log_scale.detach().sum()) * x[0, 0].numel()


class NormalizesTheBatch(Coupling):
    def forward(self, x):
        z, log_det = super().forward(x)
        return z - z.mean(0), log_det


class CoarseLogDet(Coupling):
    def forward(self, x):
        z, log_det = super().forward(x)
        return z, log_det.bfloat16().float()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (WrongSign, r"log_det, against log\|det\| of the Jacobian,: at index"),
        (ForgetsThePixels, r"log_det, against log\|det\|"),
        (ForgetsTheScale, r"log_det, against log\|det\|"),
        (SharesTheLogDet, r"log_det, against log\|det\|"),
        (MissesTheMask, r"log_det, against log\|det\|"),
        (CoarseLogDet, r"log_det, against log\|det\|"),
        (LogDetWithoutGradient, "derivative of log_det by autograd"),
        (LogDetForgetsGradientOfOneTerm, "derivative of log_det by autograd"),
        (NormalizesTheBatch, "sample 0 depends on sample 1"),
    ],
)
def test_log_det_catches(layer, message):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=message) as caught:
        assert_log_det(layer(), SHAPE)
    assert "seed 0, torch.float32" in str(caught.value)


# ---- One fault each, in the inverse ----


class SwapsTheHalves(Coupling):
    def inverse(self, z):
        active, passive = z.chunk(2, 1)
        s, t = self.scale_and_shift(passive)
        return torch.cat([(active - t) / s.exp(), passive], 1), -s.flatten(1).sum(1)


class SwapsScaleAndShift(Coupling):
    def inverse(self, z):
        passive, active = z.chunk(2, 1)
        t, s = self.scale_and_shift(passive)
        return torch.cat([passive, (active - t) / s.exp()], 1), -s.flatten(1).sum(1)


class ForgetsTheShift(Coupling):
    def inverse(self, z):
        passive, active = z.chunk(2, 1)
        s, _ = self.scale_and_shift(passive)
        return torch.cat([passive, active / s.exp()], 1), -s.flatten(1).sum(1)


class ShiftsAtTheWrongTime(Coupling):
    def inverse(self, z):
        passive, active = z.chunk(2, 1)
        s, t = self.scale_and_shift(passive)
        return torch.cat([passive, active / s.exp() - t], 1), -s.flatten(1).sum(1)


class InverseLogDetHasTheForwardSign(Coupling):
    def inverse(self, z):
        x, log_det = super().inverse(z)
        return x, -log_det


class KeepsAStaleInverse(Affine):
    cached = None

    def inverse(self, z):
        if self.cached is None or self.cached.dtype != z.dtype:
            self.cached = torch.linalg.inv(self.matrix())
        return torch.einsum("oc,bchw->bohw", self.cached, z), -self.log_abs_det(z).expand(len(z))


class InvertsInHalfPrecision(Affine):
    def inverse(self, z):
        inverse = torch.linalg.inv(self.matrix()).bfloat16().to(z.dtype)
        return torch.einsum("oc,bchw->bohw", inverse, z), -self.log_abs_det(z).expand(len(z))


class InvertsInFloat32(Affine):
    def inverse(self, z):
        x, log_det = super().inverse(z)
        return x.float().to(z.dtype), log_det


class ClipsOneDirection(Coupling):
    def scale_and_shift(self, passive):
        s, t = super().scale_and_shift(passive)
        return 3 * s, t

    def inverse(self, z):
        passive, active = z.chunk(2, 1)
        s, t = self.scale_and_shift(passive)
        s = s.clamp(-0.5, 0.5)
        return torch.cat([passive, (active - t) / s.exp()], 1), -s.flatten(1).sum(1)


class GivesNaN(Coupling):
    def inverse(self, z):
        x, log_det = super().inverse(z)
        return x.sqrt().square(), log_det


class LosesElements(Affine):
    def forward(self, x):
        z, log_det = super().forward(x)
        return z[:, :3], log_det


class LogDetPerBatch(Affine):
    def forward(self, x):
        return super().forward(x)[0], self.log_abs_det(x)


class LogDetInHalfPrecision(Coupling):
    def forward(self, x):
        z, log_det = super().forward(x)
        return z, log_det.bfloat16()


class ResultInFloat32(Affine):
    def forward(self, x):
        z, log_det = super().forward(x)
        return z.float(), log_det

    def inverse(self, z):
        x, log_det = super().inverse(z.to(self.weight.dtype))
        return x, log_det


@pytest.mark.parametrize(
    ("layer", "dtype", "message"),
    [
        (SwapsTheHalves, torch.float32, r"inverse\(layer\(x\)\): at index \(\d, \d, \d, \d\) got .* expected"),
        (SwapsScaleAndShift, torch.float32, r"inverse\(layer\(x\)\): at index"),
        (ForgetsTheShift, torch.float32, r"inverse\(layer\(x\)\): at index"),
        (ShiftsAtTheWrongTime, torch.float32, r"inverse\(layer\(x\)\): at index"),
        (MissesTheMask, torch.float32, r"inverse\(layer\(x\)\): at index"),
        (InverseLogDetHasTheForwardSign, torch.float32, "log_det of the inverse"),
        (WrongSign, torch.float32, "log_det of the inverse"),
        (KeepsAStaleInverse, torch.float32, r"inverse\(layer\(x\)\): at index"),
        (InvertsInHalfPrecision, torch.float32, r"inverse\(layer\(x\)\): at index"),
        (InvertsInFloat32, torch.float64, r"inverse\(layer\(x\)\): at index"),
        (ClipsOneDirection, torch.float32, r"inverse\(layer\(x\)\): at index"),
        (GivesNaN, torch.float32, r"inverse\(layer\(x\)\): at index .* got nan"),
        (LosesElements, torch.float32, r"as many elements per sample must come out as went in, \(2, 4, 3, 3\), got"),
        (LogDetPerBatch, torch.float32, r"log_det must have shape \(2,\), one value per sample, got \(\)"),
        (LogDetInHalfPrecision, torch.float32, "log_det must be torch.float32 or finer, got torch.bfloat16"),
        (ResultInFloat32, torch.float64, "must have the dtype of its input, torch.float64, got torch.float32"),
    ],
)
def test_round_trips_catch(layer, dtype, message):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=message) as caught:
        assert_invertible(layer(), SHAPE, dtype=dtype)
    assert f"seed 0, {dtype}" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [Affine, Coupling, InvertsInFloat32])
def test_honest_layers_pass(layer, dtype):
    torch.manual_seed(0)
    assert_log_det(layer(), SHAPE, dtype=dtype)
    if layer is not InvertsInFloat32 or dtype == torch.float32:
        assert_invertible(layer(), SHAPE, dtype=dtype)


def test_fresh_weights_would_hide_a_fault():
    torch.manual_seed(0)
    assert_invertible(ForgetsTheShift(), SHAPE, randomized=False)
    with pytest.raises(AssertionError):
        assert_invertible(ForgetsTheShift(), SHAPE)
