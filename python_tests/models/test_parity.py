"""The model with the original's weights gives the original's numbers.

Relative errors are of the largest value of a tensor. The bounds hold for float32 and, since the numbers were computed
in float32, also for our float64, whose distance to them is the original's own rounding.
"""

from __future__ import annotations

import pytest
import torch

from hflow_fast.models.hflow.original import original_names

PARITY = 1e-4


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.reshape(got.shape).to(got.dtype)
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def model(request, original_model):
    return original_model.to(request.param)


@pytest.fixture
def x(model, golden):
    return golden["x"].to(next(model.parameters()).dtype)


def latents(golden, name: str, like: torch.Tensor) -> list[torch.Tensor]:
    return [golden[f"{name}.{index}"].to(like.dtype) for index in range(4)]


@torch.no_grad()
def test_encoder_targets(model, x, golden):
    for key, target in zip(("0", "1", "2", "4"), model.targets(x), strict=True):
        assert relative_error(target, golden[f"encoder.{key}"]) < 1e-5


@torch.no_grad()
def test_encode(model, x, golden):
    z, log_det = model.encode(x)
    for got, expected in zip(z, latents(golden, "z", x), strict=True):
        assert relative_error(got, expected) < 1e-5
    assert relative_error(-log_det, golden["fldj"]) < 1e-5


@torch.no_grad()
def test_reconstruction_is_better_than_the_originals(model, x, golden):
    reconstruction, log_det = model.decode(model.encode(x)[0])
    # The original reaches 2.4e-5 in float32.
    assert (reconstruction - x).abs().max() < (5e-5 if x.dtype == torch.float32 else 1e-11)
    assert relative_error(reconstruction, golden["x_rec"]) < PARITY
    assert relative_error(log_det, golden["fldj"]) < 1e-5


@torch.no_grad()
def test_decode_of_given_latents(model, x, golden):
    image, log_det = model.decode(latents(golden, "sample_z", x))
    assert relative_error(image, golden["sample_x"]) < 1e-5
    assert relative_error(log_det, golden["sample_fldj"]) < 1e-5


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_loss_and_bound_without_noise(model, x, golden, training):
    bound = model.train(training).bound(x, noise=False)
    assert relative_error(bound.loss, golden["loss"]) < 1e-5
    assert relative_error(bound.nats, golden["eval.neg_loglik_bound_nats"]) < 1e-5
    names = {"32": "32", "16": "16", "8": "8", "endblock.1": "1_endblock"}
    to_bits = torch.log(torch.tensor(2.0))
    for ours, theirs in names.items():
        term = bound.terms[ours]
        assert relative_error(term.bits, golden[f"eval.tot.{theirs}"]) < 1e-5
        assert relative_error(-term.log_prior / (term.dims * to_bits), golden[f"eval.neg_logprior.{theirs}"]) < 1e-5
        log_det = -(term.log_det + term.entropy) / (term.dims * to_bits)
        assert relative_error(log_det, golden[f"eval.fldj.{theirs}"]) < PARITY
    assert relative_error(bound.levels["endblock.0"], golden["eval.tot.1_endblock_uncond"]) < 1e-5


def test_every_gradient(model, x, golden):
    model.loss(x, noise=False).mean().backward()
    parameters = dict(model.named_parameters())
    compared = set()
    for name, sources in original_names(model).items():
        gradient = parameters[name].grad
        pairs = zip(sources, gradient) if isinstance(sources, list) else [(sources, gradient)]
        for source, got in pairs:
            expected = golden[f"grad.{source}"].reshape(got.shape).to(got.dtype)
            # Gradients of parameters without effect (a bias before a norm) are rounding: below 1e-6 of the typical 1.
            torch.testing.assert_close(got, expected, rtol=0, atol=PARITY * expected.abs().max().item() + 1e-6)
            compared.add(f"grad.{source}")
    assert compared == {key for key in golden if key.startswith("grad.")}


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 3), (torch.float64, 6)])
def test_adam_trajectory(original_model, original_config, golden, dtype, steps):
    """Three steps stay on the original's path, and six in float64.

    Adam's first steps have the size of the learning rate whatever the gradient's size, so where a gradient is nearly
    zero its rounding decides the direction, and paths in float32 part: computed with one thread instead of two, the
    original departs from its own numbers from the fourth step on, by up to 1.2e-4 (losses) and 2.5e-4 (norms), and
    another processor's rounding takes ours as far. In float64 the path is the same everywhere, and what is left is the
    original's own rounding.
    """
    general = original_config["GENERAL"]
    rates = {"encoders": "LEARNING_RATE_ENCODERS", "flows": "LEARNING_RATE", "decoders": "LEARNING_RATE_DECODERS"}
    model, x = original_model.to(dtype), golden["x"].to(dtype)
    groups = model.parameter_groups()
    optimizer = torch.optim.Adam([{"params": groups[name], "lr": general[key]} for name, key in rates.items()])
    for step in range(steps):
        loss = model.loss(x, noise=False)
        assert relative_error(loss.detach(), golden["adam_losses"][step]) < (1e-5 if step < 3 else PARITY)
        optimizer.zero_grad()
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), general["GRAD_CLIP"])
        assert relative_error(norm, golden["adam_grad_norms"][step]) < (PARITY if step < 3 else 5e-4)
        optimizer.step()
    assert relative_error(model.loss(x, noise=False).detach(), golden["adam_losses"][steps]) < 3e-4
