"""Every layer of normflows against itself, both directions, values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hflow_fast.adapters import accelerate, networks

from .conftest import accelerated, assert_same, perturbed

nf = pytest.importorskip("normflows")

from hflow_fast.adapters import normflows as fast_layers  # noqa: E402

IMAGE = (3, 5, 4, 6)
EVEN = (3, 4, 4, 6)


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    replaced: bool = True


def conv(inputs: int, outputs: int) -> nn.Module:
    return nf.nets.ConvNet2d([inputs, 6, 6, outputs], (3, 1, 3), leaky=0.1)


def block(mode: str, channels: int = 5, scale_map: str = "sigmoid", scale: bool = True) -> nn.Module:
    """A coupling block for images."""
    first, second = (channels + 1) // 2, channels // 2
    passive, active = {"channel": (first, second), "channel_inv": (second, first)}.get(mode, (channels, channels))
    return nf.flows.AffineCouplingBlock(conv(passive, (1 + scale) * active), scale, scale_map, mode)


CASES = [
    Case("actnorm", lambda: nf.flows.ActNorm((5, 1, 1))),
    Case("actnorm-vector", lambda: nf.flows.ActNorm(5), (7, 5)),
    Case("actnorm-sequence", lambda: nf.flows.ActNorm((5, 1)), (3, 5, 4)),
    Case("actnorm-one-channel", lambda: nf.flows.ActNorm((1, 1, 1)), (3, 1, 4, 6)),
    Case("actnorm-spread", lambda: nf.flows.ActNorm((1, 1, 1))),
    Case("actnorm-per-pixel", lambda: nf.flows.ActNorm((5, 4, 6)), replaced=False),
    Case("affine-const", lambda: nf.flows.AffineConstFlow((5, 1, 1))),
    Case("affine-const-shift", lambda: nf.flows.AffineConstFlow((5, 1, 1), scale=False)),
    Case("affine-const-scale", lambda: nf.flows.AffineConstFlow((5, 1, 1), shift=False)),
    Case("affine-const-number", lambda: nf.flows.AffineConstFlow(()), (4, 5), replaced=False),
    Case("invconv", lambda: nf.flows.Invertible1x1Conv(5)),
    Case("invconv-lu", lambda: nf.flows.Invertible1x1Conv(5, use_lu=True)),
    Case("invconv-many", lambda: nf.flows.Invertible1x1Conv(40, use_lu=True), (2, 40, 3, 2)),
    Case("permute", lambda: nf.flows.Permute(5)),
    Case("permute-swap", lambda: nf.flows.Permute(5, "swap")),
    *(Case(f"block-{mode}-{scale_map}", lambda mode=mode, scale_map=scale_map: block(mode, scale_map=scale_map))
      for mode in ("channel", "channel_inv", "checkerboard", "checkerboard_inv")
      for scale_map in ("exp", "sigmoid", "sigmoid_inv")),
    *(Case(f"block-{mode}-additive", lambda mode=mode: block(mode, scale=False))
      for mode in ("channel", "channel_inv", "checkerboard")),
    Case("block-even", lambda: block("channel", 4), EVEN),
    Case("block-vector", lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 4])), (7, 5)),
    Case("block-vector-checkerboard",
         lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 6]), split_mode="checkerboard"), (7, 6)),
    Case("block-volume", lambda: nf.flows.AffineCouplingBlock(nn.Conv3d(3, 4, 1)), (2, 5, 2, 3, 2)),
    Case("glow", lambda: nf.flows.GlowBlock(5, 6)),
    Case("glow-plain", lambda: nf.flows.GlowBlock(4, 6, use_lu=False, leaky=0.2, scale_map="exp"), EVEN),
    Case("glow-additive", lambda: nf.flows.GlowBlock(5, 6, scale=False)),
    Case("glow-inverse-split", lambda: nf.flows.GlowBlock(5, 6, split_mode="channel_inv")),
    Case("glow-checkerboard", lambda: nf.flows.GlowBlock(1, 6, split_mode="checkerboard"), (3, 1, 4, 6)),
    Case("glow-net-actnorm", lambda: nf.flows.GlowBlock(5, 6, net_actnorm=True)),
    Case("glow-many", lambda: nf.flows.GlowBlock(34, 6), (2, 34, 3, 2)),
]


def built(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Initialised from data, with trained-like weights."""
    torch.manual_seed(0)
    layer = case.build()
    layer.inverse(torch.randn(case.shape) * 2 + 1)
    return perturbed(layer).to(dtype)


def directions(model: nn.Module, x: Tensor) -> list:
    return [*model.inverse(x), *model(x)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer(case: Case, dtype: torch.dtype) -> None:
    stock = built(case, dtype)
    fast, report = accelerated(stock)
    assert (type(fast) is not type(stock)) == case.replaced == ("" in {layer.name for layer in report.replaced})
    x = torch.randn(case.shape, dtype=dtype)
    for samples in (x, x[:1]):
        assert_same(stock, fast, samples, call=directions, rtol=1e-5 if dtype is torch.float32 else 1e-11)
    with torch.no_grad():  # from caches, the second time
        for _ in range(2):
            for got, expected in zip(directions(fast, x), directions(stock, x), strict=True):
                torch.testing.assert_close(got, expected)
    if x.dim() == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        assert_same(stock, fast, last, call=directions, rtol=1e-5 if dtype is torch.float32 else 1e-11)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_initialisation_is_the_stock_one(case: Case) -> None:
    torch.manual_seed(0)
    stock = case.build()
    fast = copy.deepcopy(stock)
    accelerate(fast)
    for layer in fast.modules():  # also those that accelerate leaves until they are initialised
        layer.__class__ = fast_layers.FAST_LAYERS.get(type(layer), type(layer))
    for direction in ("inverse", "forward"):
        one, two = copy.deepcopy(stock), copy.deepcopy(fast)
        x = torch.randn(case.shape) * 2 + 1
        torch.testing.assert_close(getattr(two, direction)(x), getattr(one, direction)(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["actnorm", "glow", "glow-net-actnorm"])
def test_an_initialisation_can_be_taken_back(name: str) -> None:
    stock = built(next(case for case in CASES if case.name == name))
    fast, _ = accelerated(stock)
    fast.inverse(torch.randn(IMAGE))  # which sees that it is initialised
    x = 5 * torch.randn(IMAGE) - 3
    for model in (stock, fast):
        for key, buffer in model.named_buffers():
            if key.endswith("data_dep_init_done"):
                buffer.zero_()
    torch.testing.assert_close(fast.inverse(x), stock.inverse(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.state_dict(), stock.state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"])
@pytest.mark.parametrize("scale", [True, False])
def test_coupling_of_two_parts(scale_map: str, scale: bool) -> None:
    stock = perturbed(nf.flows.AffineCoupling(conv(3, 4 if scale else 2), scale, scale_map))
    fast, _ = accelerated(stock)
    parts = [torch.randn(3, 3, 4, 6), torch.randn(3, 2, 4, 6)]
    assert_same(stock, fast, parts, call=directions)


def test_a_shift_for_all_pixels() -> None:
    class Pooled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean((2, 3), keepdim=True)

    stock = nf.flows.AffineCouplingBlock(Pooled(3, 2, 1), scale=False)
    fast, _ = accelerated(stock)
    assert_same(stock, fast, torch.randn(IMAGE), call=directions)


def test_unknown_options_stay() -> None:
    stock = nf.flows.AffineCouplingBlock(nn.Conv2d(2, 2, 1), scale_map="softplus")
    assert {layer.reason for layer in accelerate(stock).left} == {"has the unknown scale map 'softplus'"}
    stock = block("channel")
    stock.flows[2] = nf.flows.Merge("channel_inv")
    assert "was changed after it was built" in str(accelerate(stock))


def test_changed_networks_stay() -> None:
    for change in (lambda net: net.append(nn.Tanh()), lambda net: net.insert(1, nn.BatchNorm2d(6)),
                   lambda net: setattr(net[0], "padding_mode", "reflect")):
        net = conv(3, 4)
        change(net.net)
        assert not accelerate(net).replaced


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("actnorm", [False, True])
def test_network_of_many_pixels(monkeypatch, channels_last: bool, actnorm: bool) -> None:
    monkeypatch.setattr(networks, "CONVOLVES_CHANNELS_LAST", channels_last)
    formats = []
    monkeypatch.setattr(nn.functional, "leaky_relu", lambda x, *options, function=nn.functional.leaky_relu, **more: (
        formats.append(x.is_contiguous()), function(x, *options, **more))[1])
    stock = nf.nets.ConvNet2d([3, 6, 6, 4], (3, 1, 3), leaky=0.1, actnorm=actnorm)
    stock(torch.randn(2, 3, 16, 16) + 1)
    fast, _ = accelerated(perturbed(stock))
    x = torch.randn(3, 5, 16, 16)[:, :3]
    formats.clear()
    y = fast(x)
    assert formats == [not channels_last] * 2 and y.is_contiguous()
    assert_same(stock, fast, x)
    last = x.contiguous(memory_format=torch.channels_last)
    assert fast(last).is_contiguous(memory_format=torch.channels_last)
    assert_same(stock, fast, last)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), stock(x))
        perturbed(stock, seed=4), perturbed(fast, seed=4)
        torch.testing.assert_close(fast(x), stock(x))


def test_a_negative_slope() -> None:
    stock = perturbed(nf.nets.ConvNet2d([3, 6, 4], (3, 3), leaky=-0.5))
    fast, _ = accelerated(stock)
    assert_same(stock, fast, torch.randn(2, 3, 4, 4))


def test_layers_built_directly_are_fast_inside() -> None:
    torch.manual_seed(0)
    stock = nf.flows.GlowBlock(4, 6)
    torch.manual_seed(0)
    direct = fast_layers.GlowBlock(4, 6)
    assert {type(layer) for layer in direct.modules()} >= {
        fast_layers.ActNorm, fast_layers.AffineCoupling, fast_layers.AffineCouplingBlock, fast_layers.ConvNet2d,
        fast_layers.Invertible1x1Conv}
    assert str(direct) == str(stock)
    x = torch.randn(8, 4, 4, 4)
    stock.inverse(x), direct.inverse(x)
    direct.load_state_dict(perturbed(stock).state_dict())
    assert_same(stock, direct, x, call=directions)


def test_a_singular_matrix_is_named() -> None:
    layer = nf.flows.Invertible1x1Conv(2)
    with torch.no_grad():
        layer.W.copy_(torch.ones(2, 2))
    accelerate(layer)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="Invertible1x1Conv.*singular"):
        layer(torch.randn(1, 2, 2, 2))


def test_an_odd_width_is_refused_for_a_checkerboard() -> None:
    layer = block("checkerboard")
    accelerate(layer)
    with pytest.raises(ValueError, match="even last dimension"):
        layer(torch.randn(2, 5, 4, 5))


@pytest.mark.parametrize("name", ["invconv", "glow", "glow-net-actnorm"])
def test_every_change_of_a_parameter_is_seen(name: str) -> None:
    stock = built(next(case for case in CASES if case.name == name))
    fast, _ = accelerated(stock)
    x = torch.randn(IMAGE)
    changes = (
        lambda parameter: parameter.mul_(1.1),
        lambda parameter: parameter.data.mul_(1.1),  # as averages of weights are often written
        lambda parameter: setattr(parameter, "data", parameter.data * 1.1),
    )
    with torch.no_grad():
        for change in changes:
            directions(fast, x)
            for parameter in (*stock.parameters(), *fast.parameters()):
                change(parameter)
            for got, expected in zip(directions(fast, x), directions(stock, x), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_networks_beside_float32() -> None:
    fast, _ = accelerated(built(next(case for case in CASES if case.name == "glow-plain")))
    x = torch.randn(EVEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = fast.inverse(x)
        again, back = fast(z)
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back, -log_det, rtol=1e-4, atol=1e-3)
