"""Weights computed once for many passes: the same numbers, less work, nothing left behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hflow_fast.models import HFlow

from .calls import Calls


def installed(model: HFlow) -> list[str]:
    return [name for name, module in model.named_modules() if {"effective", "folded"} & module.__dict__.keys()]


def train(model: HFlow, images: torch.Tensor, *, prepared: bool, passes: int = 3) -> tuple[list, dict]:
    """Losses of ``passes`` micro-batches with noise, and the gradients they leave."""
    losses = []

    def run() -> None:
        for index in range(passes):
            torch.manual_seed(index)
            losses.append(model.loss(images.roll(index, 0) * (1 - 0.1 * index)))
            losses[-1].mean().backward()

    model.zero_grad()
    if prepared:
        with model.prepared():
            run()
    else:
        run()
    return [loss.detach() for loss in losses], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_losses_and_gradients(original_model, golden, dtype):
    model, images = original_model.to(dtype), golden["x"].to(dtype)
    losses, gradients = train(model, images, prepared=False)
    prepared_losses, prepared_gradients = train(model, images, prepared=True)
    for one, other in zip(losses, prepared_losses, strict=True):
        assert torch.equal(one, other)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name, gradient in gradients.items():
        torch.testing.assert_close(prepared_gradients[name], gradient, rtol=0,
                                   atol=tolerance * gradient.abs().max().item() + tolerance / 100)


def test_gradients_add_to_those_there(tiny_model, images):
    """Two blocks, or a plain pass and a block, before one optimizer step."""
    _, once = train(tiny_model, images, prepared=True)
    once = {name: gradient.clone() for name, gradient in once.items()}
    with tiny_model.prepared():
        for index in range(3):
            torch.manual_seed(index)
            tiny_model.loss(images.roll(index, 0) * (1 - 0.1 * index)).mean().backward()
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-4, atol=1e-5)


def test_a_group_computes_its_weights_once(original_model, golden):
    """LU of all levels in one launch, all weights scaled in one, and the same on the way back."""
    images = golden["x"]
    original_model.loss(images)
    with Calls() as calls:
        train(original_model, images, prepared=True)
    assert calls.count["lu_many_fwd"] == 1
    assert calls.count["_foreach_mul"] == 2  # forward and back
    assert calls.count["_foreach_add_"] == 2  # the second and third pass
    with Calls() as plain:
        train(original_model, images, prepared=False)
    assert plain.count["lu_many_fwd"] == 9  # per pass and level; the endblock's are rotations
    equalized = len(original_model._weights._layers)
    assert plain.count["mul"] - calls.count["mul"] > 3 * 2 * equalized
    assert plain.count["bmm"] > 2 * calls.count["bmm"]


def test_an_exception_leaves_nothing_behind(tiny_model, images):
    expected, _ = train(tiny_model, images, prepared=False)
    tiny_model.zero_grad()
    with pytest.raises(KeyError):
        with tiny_model.prepared():
            assert installed(tiny_model)
            tiny_model.loss(images).mean().backward()
            raise KeyError
    assert not installed(tiny_model)
    assert tiny_model.levels[0].context.weight.grad is None
    losses, _ = train(tiny_model, images, prepared=True)
    assert all(map(torch.equal, losses, expected)) and not installed(tiny_model)


def test_wrong_use_is_explained(tiny_model, images):
    with tiny_model.prepared():
        with pytest.raises(RuntimeError, match="already inside"):
            with tiny_model.prepared():
                pass
        assert installed(tiny_model)
    with pytest.raises(RuntimeError, match="parameters changed inside"):
        with tiny_model.prepared(), torch.no_grad():
            tiny_model.levels[1].context.bias.add_(1.0)
    assert not installed(tiny_model)


def test_frozen_parameters_get_no_gradient(tiny_model, images):
    encoders = tiny_model.parameter_groups()["encoders"]
    for parameter in encoders:
        parameter.requires_grad_(False)
    losses, gradients = train(tiny_model, images, prepared=False)
    prepared_losses, prepared_gradients = train(tiny_model, images, prepared=True)
    assert all(map(torch.equal, losses, prepared_losses))
    assert all(parameter.grad is None for parameter in encoders)
    assert {name for name, g in gradients.items() if g is None} == {n for n, g in prepared_gradients.items() if g is None}
    everything = tiny_model.requires_grad_(False)
    with everything.prepared():
        assert not everything.loss(images).requires_grad


def test_a_fresh_model_initialises_inside(images):
    """The actnorms that the first batch sets are not prepared before."""
    models = []
    for prepared in (False, True):
        torch.manual_seed(0)
        model = HFlow.from_config("tiny-16")
        losses, gradients = train(model, images, prepared=prepared)
        models.append((losses, gradients, model.state_dict()))
    (losses, gradients, state), (prepared_losses, prepared_gradients, prepared_state) = models
    assert all(map(torch.equal, losses, prepared_losses))
    assert all(torch.equal(state[name], prepared_state[name]) for name in state)
    for name, gradient in gradients.items():
        torch.testing.assert_close(prepared_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_copies_take_only_parameters(tiny_model, images):
    with tiny_model.prepared():
        copies = copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))
    for model in copies:
        assert not installed(model)
        with torch.no_grad():
            model.levels[0].context.weight.add_(1.0)
            assert not torch.equal(model.loss(images, noise=False), tiny_model.loss(images, noise=False))


@torch.no_grad()
def test_without_gradients_weights_are_kept(tiny_model, images):
    """Nothing is scaled, exponentiated or inverted twice; everything is after a change."""
    work = ("_foreach_mul", "lu_fwd", "lu_many_fwd", "bmm", "baddbmm")
    tiny_model.eval()

    def counted() -> tuple[torch.Tensor, int]:
        with Calls() as calls:
            z, _ = tiny_model.encode(images)
            x, _ = tiny_model.decode(z)
        assert not installed(tiny_model)
        return x, sum(calls.count[name] for name in work)

    with torch.enable_grad():
        z, _ = tiny_model.encode(images)
        expected = tiny_model.decode(z)[0].detach()
    first, computed = counted()
    again, kept = counted()
    assert computed > 10 and kept == 0
    assert torch.equal(first, expected) and torch.equal(again, expected)
    tiny_model.levels[0].context.weight.mul_(1.01)
    changed, computed = counted()
    assert computed == 1 and not torch.equal(changed, again)


def test_training_is_not_cut_off_by_sampling_meanwhile(tiny_model, images):
    """Another thread has installed weights without gradients."""
    _, expected = train(tiny_model, images, prepared=False, passes=1)
    tiny_model.zero_grad()
    with torch.no_grad(), tiny_model._weights.kept():
        assert installed(tiny_model)
        with torch.enable_grad():
            torch.manual_seed(0)
            tiny_model.loss(images).mean().backward()
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_compiled_passes_share_weights_too(tiny_model, images):
    tiny_model.eval()
    compiled = torch.compile(lambda x: tiny_model.loss(x, noise=False), backend="eager", fullgraph=True)
    tiny_model.zero_grad()
    with tiny_model.prepared():
        for scale in (1.0, 0.5):
            compiled(images * scale).mean().backward()
    got = {name: parameter.grad for name, parameter in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    for scale in (1.0, 0.5):
        tiny_model.loss(images * scale, noise=False).mean().backward()
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5)
