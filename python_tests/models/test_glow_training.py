"""Training a Glow: initialisation from data, micro-batches, memory, compilation."""

from __future__ import annotations

import copy

import pytest
import torch

from hflow_fast._memory import SavedBytes
from hflow_fast.models import Glow
from hflow_fast.models.glow import network
from hflow_fast.nn import set_recompute

from .glow_oracle import CLASSES, SMALL, images, likelihood, trained_like

LABELS = torch.tensor([0, 1, 2, 1])


def fresh(**keys) -> Glow:
    """With last layers that are not zero, so that the steps differ from channel maps before initialisation, too."""
    torch.manual_seed(0)
    model = Glow.from_config(SMALL | keys)
    with torch.no_grad():
        for level in model.levels:
            level.steps.networks.last.weight.normal_(0.0, 0.05)
    return model


@torch.no_grad()
@pytest.mark.parametrize("keys", [{}, {"COUPLING": "additive", "PERMUTATION": "reverse", "EDGE_BIAS": False},
                                  {"PERMUTATION": "1x1_lu", "LEVELS": 3}], ids=str)
def test_initialised_activations_have_mean_zero_and_std_one(keys):
    model, x = fresh(**keys), images(16)
    model.initialize(x)
    seen = {}
    likelihood(model.double(), x.double(), watch=seen.__setitem__)
    assert len(seen) == 3 * model.config.steps * model.config.levels
    for name, value in seen.items():
        mean, std = value.mean(dim=(0, 2, 3)), value.std(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4, msg=name)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-4, msg=name)


def test_the_first_training_pass_initialises():
    by_hand, by_loss = fresh(), fresh()
    by_hand.initialize(images())
    assert by_hand.training
    assert by_hand.is_initialized
    by_loss.loss(images())
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, by_loss.state_dict()[name]), name
    before = copy.deepcopy(by_hand.state_dict())
    by_hand.initialize(images(seed=2))
    by_hand.loss(images(seed=2))
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_initialisation_keeps_the_mode_and_evaluation_changes_nothing():
    model = fresh().eval()
    before = copy.deepcopy(model.state_dict())
    model.loss(images())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.initialize(images())
    assert not model.training
    assert model.is_initialized


def test_initialisation_needs_no_labels():
    model = fresh(**CLASSES)
    model.initialize(images())
    assert model.is_initialized


def test_a_small_glow_learns():
    torch.manual_seed(0)
    model = Glow.from_config(SMALL | {"WIDTH": 16})
    x = images(32)
    x = x.mean(dim=1, keepdim=True) + 0.1 * x  # correlated channels
    model.initialize(x)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(model.loss(x).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def gradients(model: Glow, *, prepared: bool = False, recompute: bool = False, passes: int = 3) -> dict:
    set_recompute(model, recompute)
    model.zero_grad()
    labels = LABELS if model.num_classes else None

    def run() -> None:
        for index in range(passes):
            (model.loss(images(seed=index), labels=labels).mean() * (1 + index)).backward()

    if prepared:
        with model.prepared():
            run()
    else:
        run()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("keys", [CLASSES, {"PERMUTATION": "1x1_lu"}, {"PERMUTATION": "shuffle"}], ids=str)
def test_prepared_passes_have_the_same_gradients(keys):
    model = trained_like(torch.float64, **keys)
    expected = gradients(model)
    for name, value in gradients(model, prepared=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=lambda text: f"{name}: {text}")


def test_prepared_passes_fold_once(monkeypatch):
    model, calls = trained_like(), []
    affines = model.levels[0].steps.affines
    fold = type(affines).fold
    monkeypatch.setattr(type(affines), "fold", lambda self: calls.append(self) or fold(self))
    gradients(model, prepared=True)
    assert calls.count(affines) == 1
    gradients(model)
    assert calls.count(affines) == 4


def test_prepared_in_bf16_gathers_in_float32():
    model = trained_like().set_precision("bf16")
    expected = gradients(model)
    for name, value in gradients(model, prepared=True).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


def test_prepared_blocks_that_cannot_be_right():
    model = trained_like()
    with pytest.raises(RuntimeError, match="already inside"), model.prepared(), model.prepared():
        pass
    model.loss(images())  # the block is over
    with pytest.raises(RuntimeError, match="parameters changed"), model.prepared():
        model.loss(images()).mean().backward()
        with torch.no_grad():
            model.levels[0].steps.affines.bias.add_(1.0)
    with model.prepared():
        pass
    with torch.no_grad(), model.prepared():
        model.loss(images())


def test_prepared_before_initialisation():
    model, other = fresh(), fresh()
    other.initialize(images(seed=0))
    expected = gradients(other, passes=1)
    for name, value in gradients(model, prepared=True, passes=1).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("prepared", [False, True])
def test_recomputing_changes_no_bit(prepared):
    model = trained_like(**CLASSES)
    expected = gradients(model, prepared=prepared)
    for name, value in gradients(model, prepared=prepared, recompute=True).items():
        assert torch.equal(value, expected[name]), name


def test_recomputing_keeps_a_fraction():
    model = trained_like(WIDTH=64, STEPS=4)
    kept = []
    for recompute in (False, True):
        set_recompute(model, recompute)
        with model.prepared(), SavedBytes() as saved:
            loss = model.loss(images(64))
        kept.append(saved.total)
        del loss
    assert kept[1] < 0.25 * kept[0]


def test_recomputing_notices_a_step_in_between():
    model = trained_like()
    set_recompute(model)
    loss = model.loss(images()).mean()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    with pytest.raises(RuntimeError, match="parameters changed"):
        loss.backward()


def test_bias_and_relu_in_one_pass(monkeypatch):
    """As on GPUs, whose convolutions leave a bias to another pass."""
    model = trained_like()
    expected = gradients(model)
    monkeypatch.setattr(network, "convolution_adds_bias", lambda x: False)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_noise_is_accepted_and_without_effect():
    model = trained_like()
    assert torch.equal(model(images(), False), model(images()))


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)


def test_compiled_whole():
    trained = trained_like(STEPS=1, **CLASSES)
    model = Glow.from_config(trained.config).train()
    model.load_state_dict(trained.state_dict())
    loss = compiled(model.loss)(images(), labels=LABELS)
    torch.testing.assert_close(loss, trained.loss(images(), labels=LABELS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compiled_tools():
    model = trained_like(STEPS=1, PERMUTATION="1x1_lu", COUPLING="additive").eval()
    latents, log_det = compiled(model.encode)(images())
    torch.testing.assert_close(log_det, model.encode(images())[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(compiled(model.decode)(latents)[0], images(), rtol=0, atol=1e-5)
