"""Training in less memory: activations computed again, and several groups of images in one pass."""

from __future__ import annotations

import copy

import pytest
import torch

from hflow_fast._memory import SavedBytes, peak_bytes
from hflow_fast.models import HFlow, Noise
from hflow_fast.nn import set_recompute

CPU = torch.device("cpu")


def train(model: HFlow, images: torch.Tensor, *, recompute: bool, prepared: bool = True) -> dict[str, torch.Tensor]:
    """Gradients of three passes with noise, and their losses."""
    set_recompute(model, recompute)
    model.zero_grad()
    losses = []

    def run() -> None:
        for index in range(3):
            torch.manual_seed(index)
            losses.append(model.loss(images.roll(index, 0) * (1 - 0.1 * index)))
            losses[-1].mean().backward()

    if prepared:
        with model.prepared():
            run()
    else:
        run()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return gradients | {"losses": torch.stack([loss.detach() for loss in losses])}


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recomputing_changes_no_bit(original_model, golden, dtype, prepared):
    """Nothing is approximated: the second run of a part is its first, with the same weights and the same noise."""
    model, images = original_model.to(dtype), golden["x"].to(dtype)
    stored = train(model, images, recompute=False, prepared=prepared)
    recomputed = train(model, images, recompute=True, prepared=prepared)
    for name, value in stored.items():
        assert torch.equal(recomputed[name], value), name


def test_frozen_encoders(tiny_model, images):
    for parameter in tiny_model.parameter_groups()["encoders"]:
        parameter.requires_grad_(False)
    stored = train(tiny_model, images, recompute=False)
    recomputed = train(tiny_model, images, recompute=True)
    assert stored.keys() == recomputed.keys()
    for name, value in stored.items():
        assert torch.equal(recomputed[name], value), name


def test_the_first_pass_initialises_the_same(images):
    torch.manual_seed(0)
    stored = HFlow.from_config("tiny-16")
    recomputed = copy.deepcopy(stored)
    expected = train(stored, images, recompute=False)
    for name, value in train(recomputed, images, recompute=True).items():
        assert torch.equal(value, expected[name]), name


def test_recomputing_keeps_a_fraction(tiny_model):
    images = torch.rand(16, 3, 16, 16) - 0.5
    saved, peaks = {}, {}
    for recompute in (False, True):
        set_recompute(tiny_model, recompute)

        def step() -> None:
            with tiny_model.prepared():
                tiny_model.loss(images).mean().backward()

        with SavedBytes() as kept, tiny_model.prepared():
            loss = tiny_model.loss(images)
        del loss
        step()
        saved[recompute], peaks[recompute] = kept.total, peak_bytes(step, CPU)
    assert saved[True] < 0.3 * saved[False]
    assert peaks[True] < 0.65 * peaks[False]


def test_parts_draw_no_random_numbers(tiny_model, images):
    set_recompute(tiny_model)
    loss = tiny_model.loss(images).mean()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_between_forward_and_backward_is_an_error(tiny_model, images):
    set_recompute(tiny_model)
    loss = tiny_model.loss(images).mean()
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    tiny_model.loss(images).mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="parameters changed between the forward pass and its backward pass"):
        loss.backward()


def test_graphs_are_used_once_unless_kept(tiny_model, images):
    parameters = list(tiny_model.levels[0].flow.networks[0].parameters())
    set_recompute(tiny_model)
    loss = tiny_model.loss(images).mean()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(one, other) for one, other in zip(first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, parameters)


def seeds(*values: int) -> Noise:
    return Noise([torch.Generator().manual_seed(value) for value in values])


@pytest.mark.parametrize("size", [1, 2])
def test_groups_in_one_pass_are_passes_of_their_own(original_model, golden, size):
    model = original_model.double()
    images = golden["x"].double()
    images = torch.cat([images, 0.5 * images])[: 2 * size]
    gradients = []
    for passes in ([seeds(1, 2)], [seeds(1), seeds(2)]):
        model.zero_grad()
        losses = [model.loss(part, noise) for part, noise in zip(images.chunk(len(passes)), passes)]
        torch.cat(losses).sum().backward()
        gradients.append([torch.cat(losses), *(parameter.grad for parameter in model.parameters())])
    for merged, apart in zip(*gradients):
        torch.testing.assert_close(merged, apart, rtol=0, atol=1e-10 * apart.abs().max().item() + 1e-12)


def test_groups_without_samples(tiny_model, images):
    noise = Noise((None, None), sample=False)
    apart = torch.cat([tiny_model.loss(part, noise=False) for part in images.chunk(2)])
    torch.testing.assert_close(tiny_model.loss(images, noise), apart)
    assert not torch.allclose(tiny_model.loss(images, noise=False), apart, rtol=1e-4)


def test_a_groups_own_generator_draws_what_the_global_one_does(tiny_model, images):
    torch.manual_seed(3)
    expected = tiny_model.loss(images)
    assert torch.equal(tiny_model.loss(images, seeds(3)), expected)


@pytest.mark.parametrize("generators", [(), (None,) * 3])
def test_groups_have_to_be_of_one_size(tiny_model, images, generators):
    with pytest.raises(ValueError, match=f"4 images cannot be split into {len(generators)} groups"):
        tiny_model.loss(images, Noise(generators))
