"""Networks of convolutions inside couplings: same results, in the same layout, as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hflow_fast.adapters import networks


def net(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation(), nn.Conv2d(8, 8, 1), activation(),
                         nn.Conv2d(8, 4, 3, padding=1))  # fmt: skip


def fast(module: nn.Sequential) -> nn.Sequential:
    result = copy.deepcopy(module)
    result.__class__ = networks.match(module).fast
    return result


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, lambda: nn.LeakyReLU(0.0), lambda: nn.LeakyReLU(-0.5)])
def test_outputs_and_gradients(activation, reordered, monkeypatch):
    monkeypatch.setattr(networks, "_is_reordered", lambda x: reordered)
    stock = net(activation).double()
    wide = torch.randn(4, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (stock, fast(stock)):
        y = module(wide[:, :3])  # as couplings call it
        gradients = torch.autograd.grad(y.square().sum(), [wide, *module.parameters()])
        assert y.is_contiguous()
        results.append([y, *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_large_float32_batches_are_reordered_inside(monkeypatch):
    monkeypatch.setattr(networks, "CONVOLVES_CHANNELS_LAST", True)
    stock, seen = net(), []
    module = fast(stock)
    x = torch.randn(8, 3, 8, 8)
    expected = stock(x)
    module[2].register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0]))
    torch.testing.assert_close(module(x), expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    module(x[:7])  # 448 pixels
    module(x.to(memory_format=torch.channels_last))
    assert seen[1].is_contiguous() and seen[2].is_contiguous(memory_format=torch.channels_last)
    assert not networks._is_reordered(x.double()) and not networks._is_reordered(x[0])


def test_what_a_hook_keeps_is_not_overwritten():
    stock, kept = net(), []
    module = fast(stock)
    x = torch.randn(2, 3, 8, 8)
    module[0].register_forward_hook(lambda _layer, _inputs, output: kept.append(output))
    module(x)
    torch.testing.assert_close(kept[0], stock[0](x))


@pytest.mark.parametrize("module", [
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Conv2d(4, 4, 3)),
    nn.ModuleList(net()), nn.Conv2d(3, 4, 3), type("Mine", (nn.Sequential,), {})(*net()),
])  # fmt: skip
def test_others_stay(module):
    assert networks.match(module) is None
