"""Where floating point ends: nearly singular matrices, and the rounding errors of a hundred steps."""

from __future__ import annotations

import math
import statistics
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from hflow_fast.models.hflow.affines import StepAffines
from hflow_fast.nn import FlowStep, InvConv1x1

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def with_condition(n: int, condition: float, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with singular values from 1 down to 1/condition."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.linalg.qr(torch.randn(2, n, n, dtype=torch.float64, generator=generator))[0]
    return (left * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ right).float()


def invconv(weight: torch.Tensor) -> InvConv1x1:
    layer = InvConv1x1(weight.shape[0], "full")
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def flow_step(weight: torch.Tensor) -> FlowStep:
    channels = weight.shape[0]
    layer = FlowStep(channels, nn.Conv2d(channels // 2, 2 * (channels - channels // 2), 1), parametrization="full")
    with torch.no_grad():
        layer.invconv.weight.copy_(weight)
    return layer.eval()


@pytest.mark.filterwarnings("ignore:.*numerically singular")
@pytest.mark.parametrize("n", [3, 8, 12])
@pytest.mark.parametrize("condition", [1e4, 1e6])
@torch.no_grad()
def test_round_trip_of_ill_conditioned_matrices(n, condition):
    """Near what float64 throughout would reach from a float32 z, and nearer than plain torch in float32."""
    ratios = []
    for seed in range(20):
        weight = with_condition(n, condition, seed)
        layer, x = invconv(weight), torch.randn(4, n, 16, 16, generator=torch.Generator().manual_seed(seed))
        z = layer(x)[0]
        exact = torch.einsum("oc,bchw->bohw", torch.linalg.inv(weight.double()), z.double()).float()
        plain = torch.einsum("oc,bchw->bohw", torch.linalg.inv(weight), z)
        ours, best, torchs = ((back - x).norm().item() for back in (layer.inverse(z)[0], exact, plain))
        ratios.append((ours / best, torchs / ours))
    over_best, gain = map(statistics.geometric_mean, zip(*ratios))
    assert over_best < 1.7
    assert gain > 1.05


@pytest.mark.parametrize("build", [invconv, flow_step])
@torch.no_grad()
def test_warns_once_for_every_state_that_is_numerically_singular(build):
    layer, z = build(with_condition(4, 1e8)), torch.randn(2, 4, 3, 3)
    with pytest.warns(RuntimeWarning, match=rf"{type(layer).__name__}: its matrix is numerically singular .*float32"):
        layer.inverse(z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.inverse(z)
        layer(z)
        with torch.enable_grad():  # in training, nothing waits for the device to look at values
            layer.inverse(z)
        build(with_condition(4, 1e3)).inverse(z)
        layer.double().inverse(z.double())  # float64 has digits to spare
    layer.float()
    with pytest.warns(RuntimeWarning, match="numerically singular"):
        layer.inverse(z)


@pytest.mark.parametrize("build", [invconv, flow_step])
@torch.no_grad()
def test_scaled_channels_are_no_reason_to_warn(build):
    scale = torch.tensor([1e-6, 1.0, 1e6, 1e3])
    layer, x = build(scale[:, None] * with_condition(4, 10)), torch.randn(2, 4, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = layer.inverse(layer(x)[0])[0]
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [invconv, flow_step])
@pytest.mark.parametrize(("value", "expected"), [(0.0, -math.inf), (math.nan, math.nan), (math.inf, math.nan)])
@torch.no_grad()
def test_matrices_without_an_inverse_never_give_finite_data(build, value, expected):
    weight = torch.eye(4)
    weight[0, 0] = value
    layer, z = build(weight), torch.randn(2, 4, 3, 3)
    log_det = layer(z)[1]
    torch.testing.assert_close(log_det, torch.full((2,), expected), equal_nan=True)
    with pytest.warns(RuntimeWarning, match="numerically singular"):
        x, log_det = layer.inverse(z)
    assert x.isnan().all() and not log_det.isfinite().any()


@torch.no_grad()
def test_a_chain_names_the_matrices():
    affines = StepAffines(5, 4, "full", 1.0, data_init=False)
    affines.to_data()
    affines.matrix[2] = with_condition(4, 1e8)
    affines.matrix[3] = 0
    with pytest.warns(RuntimeWarning, match="StepAffines: matrix 3, 4 of 6 is numerically singular"):
        affines.to_data()


@pytest.mark.parametrize("parametrization", ["full", "orthogonal"])
def test_both_directions_of_a_chain_undo_each_other(parametrization):
    torch.manual_seed(0)
    affines = StepAffines(3, 4, parametrization, 2.0, data_init=False).double()
    with torch.no_grad():
        for parameter in affines.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    latent, data = affines.to_latent(), affines.to_data()
    x = torch.randn(7, 4, dtype=torch.float64)
    for weight, bias, inverse, back in zip(latent.weights, latent.biases, data.weights.flip(0), data.biases.flip(0)):
        torch.testing.assert_close((x @ weight.T + bias) @ inverse.T + back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(data.log_det, -latent.log_det)
    torch.testing.assert_close(torch.linalg.slogdet(latent.weights).logabsdet.sum(), latent.log_det)


@pytest.mark.parametrize("flow", ["HFlow", "Glow"])
def test_a_hundred_steps_round_less_than_plain_torch(flow, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import round_trip

    for ours, _, ratio, lowest, _ in round_trip.compare(flow, 100, range(3)):
        assert ours < 1e-5
        assert lowest > 1 and ratio > 1.2
