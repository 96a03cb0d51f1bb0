"""Every layer, in one table: round trip and log-det by hflow_fast.testing, gradients, saving."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hflow_fast import _extension
from hflow_fast.nn import ActNorm, AffineCoupling, CouplingSpec, FlowStep, Haar, InvConv1x1, Sequential, Squeeze
from hflow_fast.testing import _tolerance, assert_invertible, assert_log_det

CHECKERBOARD = CouplingSpec(active="checkerboard", block=2, scale_map="exp_clip", shift_clamp=5.0)
SHAPE = (2, 4, 4, 4)


class ContextNet(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels // 2 + 3, 2 * (channels - channels // 2), 3, padding=1)

    def forward(self, passive: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([passive, context], dim=1))


def half_net(channels: int) -> nn.Module:
    """Raw parameters of the active channels from the passive ones."""
    return nn.Conv2d(channels // 2, 2 * (channels - channels // 2), 3, padding=1)


def full_net(channels: int) -> nn.Module:
    return nn.Conv2d(channels, 2 * channels, 3, padding=1)


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[int], nn.Module]
    """From the number of channels, at least 2."""
    context: bool = False


CASES = [
    Case("actnorm", ActNorm),
    Case("invconv-plu", InvConv1x1),
    Case("invconv-full", lambda c: InvConv1x1(c, "full")),
    Case("invconv-orthogonal", lambda c: InvConv1x1(c, "orthogonal")),
    Case("coupling-channels", lambda c: AffineCoupling(half_net(c))),
    Case("coupling-swapped", lambda c: AffineCoupling(half_net(c), swap_directions=True)),
    Case("coupling-checkerboard", lambda c: AffineCoupling(full_net(c), CHECKERBOARD)),
    Case("coupling-context", lambda c: AffineCoupling(ContextNet(c)), context=True),
    Case("coupling-all", lambda c: AffineCoupling(nn.Conv2d(3, 2 * c, 1), CouplingSpec()), context=True),
    Case("squeeze", lambda _: Squeeze()),
    Case("haar", lambda _: Haar()),
    Case("haar-rebalanced", lambda _: Haar(rebalance=2.0, order="wavelet")),
    Case("flow-step", lambda c: FlowStep(c, half_net(c))),
    Case("flow-step-swapped", lambda c: FlowStep(c, full_net(c), CHECKERBOARD, True, "orthogonal")),
    Case("sequential", lambda c: Sequential(ActNorm(c), InvConv1x1(c), FlowStep(c, half_net(c)), Squeeze())),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def context_of(case: Case, shape: tuple[int, ...]) -> torch.Tensor | None:
    return torch.randn(shape[0], 3, *shape[2:]) if case.context else None


@every_case
def test_passes_its_own_property_tests(case):
    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(
        st.tuples(st.integers(1, 3), st.integers(2, 5), st.sampled_from([2, 4]), st.sampled_from([2, 4, 6])),
        st.sampled_from([torch.float32, torch.float64]),
        st.sampled_from(["contiguous", "channels_last", "transposed"]),
        st.integers(0, 99),
    )
    def check(shape, dtype, memory, seed):
        torch.manual_seed(seed)
        layer, x = case.build(shape[1]), torch.randn(shape)
        if memory == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif memory == "transposed":
            x = x.mT.contiguous().mT
        options = {"context": context_of(case, shape), "x": x, "dtype": dtype, "seeds": [seed]}
        assert_invertible(layer, shape, **options)
        assert_log_det(layer, shape, **options)
        assert_log_det(layer.inverse, layer(x, options["context"])[0].shape, module=layer, dtype=dtype,
                       context=options["context"], seeds=[seed])

    check()


@every_case
def test_half_precision(case):
    torch.manual_seed(0)
    options = {"context": context_of(case, SHAPE), "dtype": torch.bfloat16}
    assert_invertible(case.build(4), SHAPE, **options)
    assert_log_det(case.build(4), SHAPE, **options)


@every_case
def test_plain_torch_is_as_accurate_as_the_property_tests_say(case, monkeypatch):
    monkeypatch.setattr(_extension, "_KERNELS", frozenset())
    monkeypatch.setattr(_tolerance, "PLAIN_TORCH", _tolerance.PLAIN_TORCH / 2)  # limits are twice this
    torch.manual_seed(0)
    layer, context = case.build(4), context_of(case, SHAPE)
    for dtype in (torch.float32, torch.float64):
        assert_invertible(layer, SHAPE, context=context, dtype=dtype, seeds=range(6))
        assert_log_det(layer, SHAPE, context=context, dtype=dtype, seeds=range(1))


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    torch.manual_seed(0)
    layer = request.param.build(4).double()
    x = torch.randn(SHAPE, dtype=torch.float64) * 2 + 1
    context = torch.randn(2, 3, 4, 4, dtype=torch.float64) if request.param.context else None
    layer(x, context)  # data-dependent initialisation
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer, x, context


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


def test_squeeze_of_no_images_has_the_shape_of_others():
    layer = Squeeze()
    z, log_det = layer(torch.zeros(0, 3, 8, 4))
    assert z.shape == (0, 12, 4, 2) and log_det.shape == (0,)
    assert layer.inverse(z)[0].shape == (0, 3, 8, 4)
