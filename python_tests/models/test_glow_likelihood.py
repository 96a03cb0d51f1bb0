"""Glow's likelihoods, latents and gradients against a plain one, its log-dets against the Jacobian."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from hflow_fast.models import Glow

from .glow_oracle import CLASSES, SMALL, images, likelihood, trained_like

PERMUTATIONS = ("reverse", "shuffle", "1x1", "1x1_lu")
COUPLINGS = ("additive", "affine")
VARIANTS = [
    *({"PERMUTATION": p, "COUPLING": c} for p, c in itertools.product(PERMUTATIONS, COUPLINGS)),
    {"EDGE_BIAS": False},
    {"LEARN_TOP": False},
    {"LEVELS": 1, "STEPS": 1},
    {"LEVELS": 3},
    {"RESOLUTION": 16, "LEVELS": 3, "STEPS": 3},  # the last level has more channels than the fused kernel takes
    CLASSES,
    CLASSES | {"LEARN_TOP": False},
]


def labels_of(model: Glow, count: int) -> torch.Tensor | None:
    return torch.arange(count) % model.num_classes if model.num_classes else None


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_against_a_plain_glow(keys):
    """Loss, latents, and the gradients of all parameters."""
    model = trained_like(torch.float64, **keys)
    x = images(4, model.resolution).double().requires_grad_()
    labels = labels_of(model, len(x))
    expected = likelihood(model, x, labels)
    bound = model.bound(x, labels=labels)
    latents, log_det = model.encode(x, labels)
    torch.testing.assert_close(bound.nats, -expected.log_prob, rtol=1e-9, atol=1e-9)
    for latent, truth in zip(latents, expected.latents, strict=True):
        torch.testing.assert_close(latent, truth, rtol=1e-9, atol=1e-9)
    prior = sum(Normal(0.0, 1.0).log_prob(latent).sum(dim=(1, 2, 3)) for latent in latents)
    torch.testing.assert_close(log_det + prior, expected.log_prob, rtol=1e-9, atol=1e-9)

    loss = -expected.log_prob / (math.log(2) * model.dims) + 0.01 * expected.classifier_bits
    weights = torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)
    inputs = {"x": x} | dict(model.named_parameters())
    truths = torch.autograd.grad((loss * weights).sum(), list(inputs.values()))
    gradients = torch.autograd.grad((model.loss(x, labels=labels) * weights).sum(), list(inputs.values()))
    for name, gradient, truth in zip(inputs, gradients, truths):
        assert truth.abs().max() > 0, f"{name}: a gradient that tests nothing"
        torch.testing.assert_close(gradient, truth, rtol=1e-8, atol=1e-11, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_single_precision(keys):
    model = trained_like(**keys)
    x = images(4, model.resolution)
    labels = labels_of(model, len(x))
    value = model.loss(x, labels=labels)
    assert value.dtype == torch.float32
    expected = trained_like(torch.float64, **keys).loss(x.double(), labels=labels)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 5e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_round_trip(keys, dtype, atol, count):
    model = trained_like(dtype, **keys).eval()
    x = images(count, model.resolution).to(dtype)
    labels = labels_of(model, count)
    latents, log_det = model.encode(x, labels)
    decoded, log_det_back = model.decode(latents, labels)
    assert [tuple(latent.shape[1:]) for latent in latents] == model.latent_shapes
    assert log_det.dtype == decoded.dtype == dtype
    torch.testing.assert_close(decoded, x, rtol=0, atol=atol)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e3 * atol)
    again, _ = model.encode(decoded, labels)
    for latent, other in zip(latents, again):
        torch.testing.assert_close(other, latent, rtol=0, atol=1e2 * atol)


@pytest.mark.parametrize("keys", [{"PERMUTATION": "1x1_lu"}, {"COUPLING": "additive", "PERMUTATION": "shuffle"},
                                  CLASSES], ids=str)
def test_log_det_is_that_of_the_jacobian(keys):
    model = trained_like(torch.float64, RESOLUTION=4, **keys)
    x = images(1, 4).double()
    labels = labels_of(model, 1)

    def to_latents(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([latent.flatten() for latent in model.encode(x, labels)[0]])

    jacobian = torch.autograd.functional.jacobian(to_latents, x).view(model.dims, model.dims)
    _, log_det = model.encode(x, labels)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_density_integrates_to_one():
    """Over the twelve values of an image of 2 × 2 pixels, by importance sampling from a wider Gaussian."""
    model = trained_like(torch.float64, RESOLUTION=2, LEVELS=1).eval()
    generator = torch.Generator().manual_seed(0)
    own = model.sample(20000, std=1.0, generator=generator).flatten(1)
    factor = 1.3 * torch.linalg.cholesky(torch.cov(own.T))
    proposal = torch.distributions.MultivariateNormal(own.mean(dim=0), scale_tril=factor)
    noise = torch.randn(60000, 12, dtype=torch.float64, generator=generator)
    x = proposal.loc + noise @ factor.T
    ratio = (-model.bound(x.view(-1, 3, 2, 2)).nats - proposal.log_prob(x)).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 4 * error


def test_lu_is_the_same_model_as_plain():
    lu = trained_like(torch.float64, PERMUTATION="1x1_lu")
    plain = trained_like(torch.float64, seed=1)
    state = {name: value for name, value in lu.state_dict().items()
             if not name.endswith(("lower", "upper", "log_diagonal", "sign", "order"))}
    for index, level in enumerate(lu.levels):
        state[f"levels.{index}.steps.affines.weight"] = level.steps.affines.matrices()[0]
    plain.load_state_dict(state)
    x = images().double()
    torch.testing.assert_close(plain.bound(x).nats, lu.bound(x).nats, rtol=1e-10, atol=1e-10)


def test_lu_starts_as_a_rotation():
    matrices, log_dets = Glow.from_config(SMALL | {"PERMUTATION": "1x1_lu"}).levels[0].steps.affines.matrices()
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(12).expand(2, -1, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_dets, torch.zeros(2), rtol=0, atol=1e-5)


def test_zero_embeddings_are_no_condition():
    model, plain = trained_like(**CLASSES), trained_like(seed=1)
    with torch.no_grad():
        for parameter in (*model.embedding.parameters(), *model.classifier.parameters()):
            parameter.zero_()
    plain.load_state_dict({name: value for name, value in model.state_dict().items()
                           if not name.startswith(("embedding", "classifier"))})
    x, labels = images(), torch.tensor([0, 1, 2, 1])
    torch.testing.assert_close(model.bound(x, labels=labels).nats, plain.bound(x).nats, rtol=1e-6, atol=1e-4)
    extra = 0.01 * math.log2(3)  # three classes at equal odds
    torch.testing.assert_close(model.loss(x, labels=labels), plain.loss(x) + extra, rtol=1e-6, atol=1e-6)
    for latent, other in zip(model.encode(x, labels)[0], plain.encode(x)[0]):
        torch.testing.assert_close(latent, other, rtol=1e-5, atol=1e-5)


def test_the_bound_names_its_levels():
    model = trained_like(LEVELS=3)
    bound = model.bound(images())
    assert list(bound.terms) == ["1", "2", "4"]
    assert sum(term.dims for term in bound.terms.values()) == model.dims == bound.dims
    torch.testing.assert_close(bound.loss, bound.nats / (model.dims * math.log(2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bound.bits_per_dim(5), bound.loss + 5, rtol=1e-5, atol=1e-5)
