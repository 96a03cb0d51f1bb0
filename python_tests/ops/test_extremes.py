"""Couplings at raw outputs far beyond what networks give: infinite only where the mathematics has no finite answer."""

from __future__ import annotations

import math

import pytest
import torch

from hflow_fast import reference
from hflow_fast.ops import CouplingSpec, coupling, flow_step

from ._cases import SCALE_MAPS

FAR = (-3e38, -1e20, -1e4, -200.0, -88.0, 88.0, 200.0, 1e4, 1e20, 3e38)
CLAMP = 1.5


def log_scale(scale_map: str, s: float) -> float:
    """log a(s) from the definitions, in forms that do not overflow."""
    log_sigmoid = -math.log1p(math.exp(-(s + 2))) if s > -30 else s + 2
    return {
        "none": 0.0,
        "exp": s,
        "exp_clip": min(max(s, -CLAMP), CLAMP),
        "exp_tanh": math.tanh(s),
        "sigmoid": log_sigmoid,
        "sigmoid_inverse": -log_sigmoid,
        "sigmoid_floor": math.log(math.exp(log_sigmoid) + 1e-3),
        "atan": 0.636 * CLAMP * math.atan(s),
        "tanh": CLAMP * math.tanh(s / CLAMP),
    }[scale_map]


def scale(logarithm: float, dtype: torch.dtype) -> float:
    """e^logarithm as ``dtype`` holds it: infinite beyond its range."""
    return torch.tensor(logarithm, dtype=torch.float64).exp().to(dtype).item()


def arguments(scale_map: str, s: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, CouplingSpec]:
    x = torch.full((1, 1, 5, 5), 0.75, dtype=dtype)  # odd sizes: whole vectors and what is left of them
    raw = torch.full((1, 1 if scale_map == "none" else 2, 5, 5), 0.25, dtype=dtype)
    if scale_map != "none":
        raw[:, 0] = s
    return x, raw, CouplingSpec(scale_map, clamp=CLAMP)


@pytest.mark.parametrize("function", [coupling, reference.coupling])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_values_are_infinite_only_where_they_must_be(function, dtype, inverse, scale_map):
    eps = torch.finfo(dtype).eps
    for s in FAR:
        x, raw, spec = arguments(scale_map, s, dtype)
        y, log_det = function(x, raw, spec, inverse=inverse)
        logarithm = (-1 if inverse else 1) * log_scale(scale_map, float(raw[0, 0, 0, 0]))
        expected_log_det = torch.full((1,), 25 * logarithm, dtype=torch.float64).to(dtype)
        torch.testing.assert_close(log_det, expected_log_det, rtol=8 * eps, atol=25 * eps)  # a sum of 25
        a = scale(logarithm, dtype)
        expected = (0.75 - 0.25) * a if inverse else 0.75 * a + 0.25
        # Rounding s itself moves e^s by |s|·eps.
        tolerance = (8 + 4 * min(abs(logarithm), 1000.0)) * eps
        torch.testing.assert_close(y, torch.full_like(y, expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale_map", ["exp_clip", "exp_tanh", "atan", "tanh", "none"])
@pytest.mark.parametrize("s", [math.inf, -math.inf])
def test_bounded_maps_bear_infinite_outputs(dtype, inverse, scale_map, s):
    x, raw, spec = arguments(scale_map, s, dtype)
    x, raw = x.requires_grad_(), raw.requires_grad_()
    y, log_det = coupling(x, raw, spec, inverse=inverse)
    assert y.isfinite().all() and log_det.isfinite().all()
    for gradient in torch.autograd.grad(y.sum() + log_det.sum(), (x, raw)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_gradients_are_finite_where_values_are(dtype, inverse, scale_map):
    for s in FAR:
        x, raw, spec = arguments(scale_map, s, dtype)
        x, raw = x.requires_grad_(), raw.requires_grad_()
        weight, bias = torch.eye(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        for y, log_det in (
            coupling(x, raw, spec, inverse=inverse),
            flow_step(x, raw, weight, bias, spec, inverse=inverse),
        ):
            gradients = torch.autograd.grad(y.sum() + log_det.sum(), (x, raw))
            if y.isfinite().all():
                assert all(gradient.isfinite().all() for gradient in gradients), s
            assert not any(gradient.isnan().any() for gradient in gradients), s
