"""Networks of the user, called with fewer passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hflow_fast.adapters import networks
from hflow_fast.adapters.networks import call_network

NETWORKS = {
    "relu": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
                                  nn.Conv2d(8, 6, 3, padding=1)),
    "leaky": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 1), nn.LeakyReLU(-0.2),
                                   nn.Conv2d(8, 6, 1)),
    "rectified first and twice": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 6, 1), nn.Tanh(), nn.ReLU(), nn.ReLU()),
    "normalised": lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                        nn.Conv2d(8, 6, 1)),
    "with a layer of its own": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Viewing()),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Conv2d(8, 6, 1)),
}


class Viewing(nn.Module):
    """Works on contiguous activations only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1).view_as(x)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reorders", [False, True], ids=["as it is", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gives_what_the_network_gives(name, reorders, dtype, monkeypatch):
    monkeypatch.setattr(networks, "CONVOLVES_CHANNELS_LAST", reorders)
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype)
    whole = torch.randn(2, 5, 16, 16, dtype=dtype)
    results = []
    for call in (network, lambda x: call_network(network, x)):
        x = whole[:, :3].clone().requires_grad_()
        kept = x.detach().clone()
        torch.manual_seed(1)
        network.zero_grad()
        y = call(x)
        y.square().sum().backward()
        assert torch.equal(x.detach(), kept)
        assert y.is_contiguous()
        results.append([y.detach(), x.grad, *(parameter.grad.clone() for parameter in network.parameters())])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 if dtype is torch.float32 else 1e-10)


def test_activations_are_channels_last_where_that_is_quicker(monkeypatch):
    seen = []
    monkeypatch.setattr(networks, "CONVOLVES_CHANNELS_LAST", True)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: seen.append(x.stride()) or self._conv_forward(
        x, self.weight, self.bias))
    network = NETWORKS["relu"]()
    call_network(network, torch.randn(2, 3, 16, 16))
    assert all(stride[1] == 1 for stride in seen) and len(seen) == 3
    seen.clear()
    call_network(network, torch.randn(2, 3, 4, 4))
    assert not any(stride[1] == 1 for stride in seen)


def test_whoever_listens_hears_all():
    network = NETWORKS["relu"]()
    heard = []
    network[1].register_forward_hook(lambda layer, inputs, output: heard.append((inputs[0].min(), output.min())))
    call_network(network, torch.randn(2, 3, 16, 16))
    assert len(heard) == 1 and heard[0][0] < 0 == heard[0][1]
