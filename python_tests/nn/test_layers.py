"""Every layer, in one table: shapes, round trip, log-det against the autograd Jacobian, gradients, saving."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hflow_fast.nn import ActNorm, AffineCoupling, CouplingSpec, FlowStep, Haar, InvConv1x1, Sequential, Squeeze

CHECKERBOARD = CouplingSpec(active="checkerboard", block=2, scale_map="exp_clip", shift_clamp=5.0)
SHAPE = (2, 4, 4, 4)


class ContextNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 + 3, 4, 3, padding=1)

    def forward(self, passive: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([passive, context], dim=1))


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    context: bool = False


CASES = [
    Case("actnorm", lambda: ActNorm(4)),
    Case("invconv-plu", lambda: InvConv1x1(4)),
    Case("invconv-full", lambda: InvConv1x1(4, "full")),
    Case("invconv-orthogonal", lambda: InvConv1x1(4, "orthogonal")),
    Case("coupling-channels", lambda: AffineCoupling(nn.Conv2d(2, 4, 3, padding=1))),
    Case("coupling-swapped", lambda: AffineCoupling(nn.Conv2d(2, 4, 3, padding=1), swap_directions=True)),
    Case("coupling-checkerboard", lambda: AffineCoupling(nn.Conv2d(4, 8, 3, padding=1), CHECKERBOARD)),
    Case("coupling-context", lambda: AffineCoupling(ContextNet()), context=True),
    Case("coupling-all", lambda: AffineCoupling(nn.Conv2d(3, 8, 1), CouplingSpec()), context=True),
    Case("squeeze", Squeeze),
    Case("haar", Haar),
    Case("haar-rebalanced", lambda: Haar(rebalance=2.0, order="wavelet")),
    Case("flow-step", lambda: FlowStep(4, nn.Conv2d(2, 4, 3, padding=1))),
    Case("flow-step-swapped", lambda: FlowStep(4, nn.Conv2d(4, 8, 3, padding=1), CHECKERBOARD, True, "orthogonal")),
    Case("sequential", lambda: Sequential(ActNorm(4), InvConv1x1(4), FlowStep(4, nn.Conv2d(2, 4, 1)), Squeeze())),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    torch.manual_seed(0)
    layer = request.param.build().double()
    x = torch.randn(SHAPE, dtype=torch.float64) * 2 + 1
    context = torch.randn(2, 3, 4, 4, dtype=torch.float64) if request.param.context else None
    layer(x, context)  # data-dependent initialisation
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer, x, context


def test_round_trip(case):
    layer, x, context = case
    z, log_det = layer(x, context)
    back, back_log_det = layer.inverse(z, context)
    assert log_det.shape == (2,) and z.numel() == x.numel()
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_log_det_is_the_jacobian(case, direction):
    layer, x, context = case
    function = layer.forward if direction == "forward" else layer.inverse
    value = x if direction == "forward" else layer(x, context)[0].detach()
    first = None if context is None else context[:1]
    log_det = function(value[:1], first)[1]
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v, first)[0], value[:1])
    size = value[0].numel()
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.reshape(size, size))[1], log_det[0], rtol=0, atol=1e-9)


def test_gradients(case):
    layer, x, context = case
    parameters = list(layer.parameters())

    def run(x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return layer(x, context)

    assert torch.autograd.gradcheck(run, (x[:1].requires_grad_(), *parameters) if context is None else
                                    (x.requires_grad_(), *parameters), fast_mode=True)


def test_survives_saving(case):
    layer, x, context = case
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    fresh.train()
    for got, expected in zip(fresh(x, context), layer(x, context)):
        assert torch.equal(got, expected)


def test_actnorm_normalises_its_first_batch_only():
    layer = ActNorm(3)
    x = torch.randn(16, 3, 8, 8) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1) + 7
    z, _ = layer(x)
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(dim=(0, 2, 3)), torch.ones(3), rtol=1e-4, atol=0)
    bias = layer.bias.clone()
    layer(x * 3)
    assert torch.equal(layer.bias, bias)


def test_actnorm_in_eval_mode_and_without_data_init_is_the_identity():
    x = torch.randn(4, 3, 2, 2) + 5
    assert torch.equal(ActNorm(3).eval()(x)[0], x)
    assert torch.equal(ActNorm(3, data_init=False)(x)[0], x)


def test_loaded_actnorm_does_not_start_again():
    trained = ActNorm(3)
    trained(torch.randn(4, 3, 8, 8) + 2)
    loaded = ActNorm(3)
    assert not loaded.is_initialized
    loaded.load_state_dict(trained.state_dict())
    loaded(torch.randn(4, 3, 8, 8) - 9)
    assert torch.equal(loaded.bias, trained.bias)


def test_actnorm_needs_two_values_per_channel():
    with pytest.raises(ValueError, match="fewer than two values per channel"):
        ActNorm(3)(torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize("parametrization", ["plu", "full", "orthogonal"])
@torch.no_grad()
def test_invconv_cache_follows_every_change(parametrization):
    torch.manual_seed(0)
    layer, other = InvConv1x1(5, parametrization), InvConv1x1(5, parametrization)
    x = torch.randn(2, 5, 3, 3)

    def check() -> None:
        z, log_det = layer(x)
        torch.testing.assert_close(layer.inverse(z)[0], x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(log_det, torch.linalg.slogdet(layer.matrix_and_log_det()[0])[1].expand(2) * 9,
                                   rtol=1e-4, atol=1e-4)

    check()
    before = layer(x)[0]
    for parameter in layer.parameters():
        parameter.mul_(1.1)
    assert not torch.equal(layer(x)[0], before)
    check()
    layer.load_state_dict(other.state_dict())
    check()
    assert torch.equal(layer(x)[0], other(x)[0])
    for parameter in layer.parameters():
        parameter.data = parameter.data * 0.9
    check()
    assert layer.double()(x.double())[0].dtype == torch.float64


def test_invconv_does_not_repeat_work_while_nothing_changes(monkeypatch):
    import hflow_fast.nn.invconv as module

    calls = []
    monkeypatch.setattr(module, "lu", lambda matrix, lu=module.lu: calls.append(1) or lu(matrix))
    layer, x = InvConv1x1(4, "full"), torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert len(calls) == 1
    layer(x)  # with gradients, nothing is remembered
    assert len(calls) == 2


def test_flow_step_is_its_parts():
    torch.manual_seed(0)
    step = FlowStep(4, nn.Conv2d(2, 4, 3, padding=1)).double()
    x = torch.randn(SHAPE, dtype=torch.float64)
    got = step(x)
    expected = Sequential(step.coupling, step.actnorm, step.invconv)(x)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_squeeze_order_is_glows():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert Squeeze()(x)[0].flatten().tolist() == list(range(8))


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="plu, full, orthogonal"):
        InvConv1x1(3, "qr")
    with pytest.raises(ValueError, match="multiples of 2"):
        Squeeze()(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match="from the context"):
        AffineCoupling(nn.Identity(), CouplingSpec())(torch.zeros(1, 2, 4, 4))
