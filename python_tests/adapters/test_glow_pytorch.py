"""Recognising layers of the PyTorch ports of Glow: layer by layer, and edited copies, which stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hflow_fast.adapters import accelerate

from . import chaiyujin_stand_in as chaiyujin
from . import rosinality_stand_in as rosinality
from .conftest import accelerated, assert_same, perturbed

CHANNELS = 4


def prepared(layer: nn.Module) -> nn.Module:
    """Initialised and as after some training."""
    for module in layer.modules():
        if hasattr(module, "initialized"):
            module.initialized.fill_(1)
        if hasattr(module, "inited"):
            module.inited = True
    return perturbed(layer, 0.2).eval()


def forward_and_reverse(layer: nn.Module, x: Tensor) -> list:
    return [layer(x), layer.reverse(x)]


def both_ways(layer: nn.Module, x: Tensor) -> list:
    total = x.flatten(1).sum(1)
    return [*layer(x, total), *layer(x, logdet=total, reverse=True), *layer(x, 0.0)]


def without_log_det(layer: nn.Module, x: Tensor) -> list:
    return [layer(x)[0], layer(x, reverse=True)[0]]


Call = Callable[[nn.Module, Tensor], list]
LAYERS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "ActNorm": (lambda: rosinality.ActNorm(CHANNELS), forward_and_reverse),
    "ActNorm-no-log-det": (lambda: rosinality.ActNorm(CHANNELS, logdet=False), forward_and_reverse),
    "ActNorm-many": (lambda: rosinality.ActNorm(40), forward_and_reverse),
    "InvConv2d": (lambda: rosinality.InvConv2d(CHANNELS), forward_and_reverse),
    "InvConv2d-many": (lambda: rosinality.InvConv2d(40), forward_and_reverse),
    "InvConv2dLU": (lambda: rosinality.InvConv2dLU(CHANNELS), forward_and_reverse),
    "AffineCoupling": (lambda: rosinality.AffineCoupling(CHANNELS), forward_and_reverse),
    "AffineCoupling-additive": (lambda: rosinality.AffineCoupling(CHANNELS, affine=False), forward_and_reverse),
    "Flow": (lambda: rosinality.Flow(CHANNELS), forward_and_reverse),
    "Flow-additive": (lambda: rosinality.Flow(CHANNELS, affine=False, conv_lu=False), forward_and_reverse),
    "ActNorm2d": (lambda: chaiyujin.ActNorm2d(CHANNELS), both_ways),
    "ActNorm2d-in-a-network": (lambda: chaiyujin.ActNorm2d(CHANNELS), without_log_det),
    "Conv2d": (lambda: chaiyujin.Conv2d(CHANNELS, 6, 3, chaiyujin.ActNorm2d), lambda layer, x: [layer(x)]),
    "InvertibleConv1x1": (lambda: chaiyujin.InvertibleConv1x1(CHANNELS), both_ways),
    "InvertibleConv1x1-lu": (lambda: chaiyujin.InvertibleConv1x1(CHANNELS, True), both_ways),
    "Permute2d": (lambda: chaiyujin.Permute2d(CHANNELS, True), lambda layer, x: [layer(x), layer(x, reverse=True)]),
    "FlowStep": (lambda: chaiyujin.FlowStep(CHANNELS, 6, flow_coupling="affine"), both_ways),
    "FlowStep-additive": (lambda: chaiyujin.FlowStep(CHANNELS, 6, "reverse"), both_ways),
    "FlowStep-no-log-det": (lambda: chaiyujin.FlowStep(CHANNELS, 6, "shuffle"), without_log_det),
    "FlowStep-many": (lambda: chaiyujin.FlowStep(40, 6, "shuffle"), both_ways),
    "SqueezeLayer": (lambda: chaiyujin.SqueezeLayer(2), both_ways),
    "Split2d": (lambda: chaiyujin.Split2d(CHANNELS), lambda layer, x: [*layer(x, x[:, 0, 0, 0]), *layer(x)]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_layer_by_layer(name: str, dtype: torch.dtype) -> None:
    build, call = LAYERS[name]
    torch.manual_seed(0)
    stock = prepared(build()).to(dtype)
    fast, report = accelerated(stock)
    assert "" in [layer.name for layer in report.replaced], report
    x = torch.randn(3, 40 if "many" in name else CHANNELS, 2, 4, generator=torch.Generator().manual_seed(1))
    assert_same(stock, fast, x.to(dtype), call=call, rtol=1e-5 if dtype == torch.float32 else 1e-11)
    assert_same(stock, fast, x[:1].to(dtype), call=call, rtol=1e-5 if dtype == torch.float32 else 1e-11)


def test_scales_of_either_sign() -> None:
    stock = prepared(rosinality.Flow(CHANNELS))
    with torch.no_grad():
        stock.actnorm.scale[:, 1::2] *= -1
    fast, _ = accelerated(stock)
    assert_same(stock, fast, torch.randn(2, CHANNELS, 2, 4), call=forward_and_reverse)


def test_a_permutation_that_is_written_to_later() -> None:
    layer = chaiyujin.Permute2d(CHANNELS, False)
    x = torch.randn(2, CHANNELS, 2, 2)
    accelerate(layer)
    layer(x)
    layer.indices[:] = [1, 2, 3, 0]
    layer.indices_inverse[:] = [3, 0, 1, 2]
    assert torch.equal(layer(x), x[:, [1, 2, 3, 0]])
    assert torch.equal(layer(layer(x), reverse=True), x)


def edited(base: type[nn.Module], **methods: Callable) -> type[nn.Module]:
    """What someone who copied ``base`` into their code made of it: the same name and structure."""
    return type(base.__name__, (base,), methods)


def exp_scale(self: nn.Module, passive: Tensor) -> tuple[Tensor, Tensor]:
    log_scale, shift = self.net(passive).chunk(2, 1)
    return log_scale.exp(), shift


def shift_first(self: nn.Module, passive: Tensor) -> tuple[Tensor, Tensor]:
    shift, log_scale = self.net(passive).chunk(2, 1)
    return torch.sigmoid(log_scale + 2), shift


def floored_scale(self: nn.Module, passive: Tensor) -> tuple[Tensor, Tensor]:
    log_scale, shift = self.net(passive).chunk(2, 1)
    return torch.sigmoid(log_scale + 2) + 1e-3, shift


def clamped_scale(self: nn.Module, passive: Tensor) -> tuple[Tensor, Tensor]:
    log_scale, shift = self.net(passive).chunk(2, 1)
    return torch.sigmoid(log_scale.clamp(-5, 5) + 2), shift


def interleaved(self: nn.Module, passive: Tensor) -> tuple[Tensor, Tensor]:
    raw = self.net(passive)
    return torch.sigmoid(raw[:, 0::2] + 2), raw[:, 1::2]


def scale_then_shift(self: nn.Module, input: Tensor):
    passive, active = input.chunk(2, 1)
    scale, shift = self.scale_and_shift(passive)
    return torch.cat([passive, active * scale + shift], 1), scale.log().flatten(1).sum(1)


def other_half(self: nn.Module, input: Tensor):
    active, passive = input.chunk(2, 1)
    scale, shift = self.scale_and_shift(passive)
    return torch.cat([(active + shift) * scale, passive], 1), scale.log().flatten(1).sum(1)


def mean_log_det(self: nn.Module, input: Tensor):
    passive, active = input.chunk(2, 1)
    scale, shift = self.scale_and_shift(passive)
    return torch.cat([passive, (active + shift) * scale], 1), scale.log().flatten(1).mean(1)


def wrong_reverse(self: nn.Module, output: Tensor) -> Tensor:
    passive, active = output.chunk(2, 1)
    scale, shift = self.scale_and_shift(passive)
    return torch.cat([passive, (active - shift) / scale], 1)


def scale_before_loc(self: nn.Module, input: Tensor):
    return input * self.scale + self.loc, input.shape[2] * input.shape[3] * self.scale.abs().log().sum()


def transposed(self: nn.Module) -> Tensor:
    lower = self.l_eye + self.l_mask * self.w_l
    upper = torch.diag(self.w_s.exp() * self.s_sign) + self.u_mask * self.w_u
    return (upper @ lower @ self.w_p)[:, :, None, None]


def permuted_first(self: nn.Module, input: Tensor):
    out, first = self.invconv(input)
    out, second = self.actnorm(out)
    out, third = self.coupling(out)
    return out, first + second + third


AFFINE = rosinality.AffineCoupling
EDITED: dict[str, Callable[[], nn.Module]] = {
    "exp": lambda: edited(AFFINE, scale_and_shift=exp_scale)(CHANNELS),
    "shift-first": lambda: edited(AFFINE, scale_and_shift=shift_first)(CHANNELS),
    "floor": lambda: edited(AFFINE, scale_and_shift=floored_scale)(CHANNELS),
    "clamp": lambda: edited(AFFINE, scale_and_shift=clamped_scale)(CHANNELS),
    "interleaved": lambda: edited(AFFINE, scale_and_shift=interleaved)(CHANNELS),
    "scale-then-shift": lambda: edited(AFFINE, forward=scale_then_shift)(CHANNELS),
    "other-half": lambda: edited(AFFINE, forward=other_half)(CHANNELS),
    "mean-log-det": lambda: edited(AFFINE, forward=mean_log_det)(CHANNELS),
    "reverse": lambda: edited(AFFINE, reverse=wrong_reverse)(CHANNELS),
    "actnorm": lambda: edited(rosinality.ActNorm, forward=scale_before_loc)(CHANNELS),
    "invconv": lambda: edited(rosinality.InvConv2dLU, calc_weight=transposed)(CHANNELS),
    "flow": lambda: edited(rosinality.Flow, forward=permuted_first)(CHANNELS),
    "block": lambda: edited(rosinality.Block, forward=lambda self, input: self.flows[0](input))(CHANNELS // 4, 2),
    "convolution": lambda: edited(chaiyujin.Conv2d, forward=lambda self, input: torch.relu(
        self.actnorm(nn.functional.conv2d(input, self.weight, padding=1))[0]))(CHANNELS, 6, 3, chaiyujin.ActNorm2d),
    "permute": lambda: edited(chaiyujin.Permute2d, forward=lambda self, input, reverse=False: input)(CHANNELS, False),
    "flow-step": lambda: edited(chaiyujin.FlowStep, permuted=lambda self, z, logdet, reverse: (z, logdet))(CHANNELS, 6),
    "squeeze": lambda: edited(chaiyujin.SqueezeLayer, forward=lambda self, input, logdet=None, reverse=False: (
        input.flip(1), logdet))(2),
    "split": lambda: edited(chaiyujin.Split2d, split2d_prior=lambda self, z: self.conv(z).chunk(2, 1))(CHANNELS),
}


@pytest.mark.parametrize("name", EDITED)
def test_edited_copies_stay(name: str) -> None:
    torch.manual_seed(0)
    layer = prepared(EDITED[name]())
    before = copy.deepcopy(layer.state_dict())
    kind, noise = type(layer), torch.get_rng_state()
    report = accelerate(layer)
    assert type(layer) is kind
    assert ["behaves otherwise" in left.reason or "cannot be tried" in left.reason
            for left in report.left if left.name == ""] == [True]
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)


def test_as_it_starts_an_edited_copy_is_no_different() -> None:
    """Zero networks and actnorms that change nothing hide most edits from a comparison on the layer's own weights."""
    layer = edited(rosinality.AffineCoupling, forward=scale_then_shift)(CHANNELS)
    stock = rosinality.AffineCoupling(CHANNELS)
    x = torch.randn(2, CHANNELS, 2, 2)
    assert all(torch.equal(*pair) for pair in zip(layer(x), stock(x)))
    assert not accelerate(layer).replaced
    assert accelerate(stock).replaced


def test_what_is_around_an_edited_coupling() -> None:
    flow = prepared(rosinality.Flow(CHANNELS))
    flow.coupling = prepared(EDITED["exp"]())
    x = torch.randn(2, CHANNELS, 2, 4)
    expected = flow(x)
    report = accelerate(flow)
    assert {layer.name for layer in report.replaced} == {"actnorm", "invconv"}
    assert {layer.name for layer in report.left} == {"", "coupling"}
    for got, value in zip(flow(x), expected):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


class WithNoise(rosinality.AffineCoupling):
    """What someone derived from a port."""


def more_arguments(self: nn.Module, input: Tensor, temperature: float = 1.0) -> Tensor:
    return input


def with_parameter() -> nn.Module:
    layer = rosinality.InvConv2dLU(CHANNELS)
    layer.bias = nn.Parameter(torch.zeros(CHANNELS))
    return layer


def with_name_of_ours() -> nn.Module:
    layer = rosinality.InvConv2dLU(CHANNELS)
    layer.kind = "lu"
    return layer


def without_initialised() -> nn.Module:
    layer = rosinality.ActNorm(CHANNELS)
    del layer.initialized
    return layer


@pytest.mark.parametrize(("build", "reason"), [
    (lambda: WithNoise(CHANNELS), "is a subclass of AffineCoupling"),
    (lambda: edited(rosinality.InvConv2d, forward=more_arguments)(CHANNELS), "forward() takes (input, temperature)"),
    (with_parameter, "it holds"),
    (with_name_of_ours, "it has a kind of its own"),
    (without_initialised, "it holds"),
    (lambda: rosinality.ActNorm(CHANNELS), "not initialised from data yet"),
    (lambda: chaiyujin.ActNorm2d(CHANNELS).eval(), "not initialised from data yet"),
    (lambda: nn.utils.parametrizations.weight_norm(prepared(rosinality.InvConv2d(CHANNELS))), "parametrized"),
])
def test_what_does_not_fit_stays(build: Callable[[], nn.Module], reason: str) -> None:
    layer = build()
    kind = type(layer)
    report = accelerate(layer)
    assert type(layer) is kind
    assert [reason in left.reason for left in report.left if left.name == ""] == [True], report


class Block(nn.Module):
    """Of something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_common_names_are_none_of_ours() -> None:
    report = accelerate(nn.Sequential(Block()))
    assert not report.replaced and not report.left


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        layer = rosinality.AffineCoupling(CHANNELS)
    report = accelerate(layer)
    assert not report.replaced
    assert "meta" in report.left[0].reason
