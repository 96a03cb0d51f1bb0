"""What users do with a Glow: sample, encode, save, copy; and what they do wrong."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hflow_fast.data.dequantize import to_uint8
from hflow_fast.models import Glow
from hflow_fast.models.glow.affines import StepAffines

from .glow_oracle import CLASSES, SMALL, images, trained_like

LABELS = torch.tensor([0, 1, 2, 1])


@torch.no_grad()
def test_8_bit_images_survive():
    model = trained_like(RESOLUTION=16, LEVELS=3, STEPS=4).eval()
    pixels = to_uint8(images(4, 16))
    x = (pixels.float() + 0.5) / 256 - 0.5
    assert torch.equal(to_uint8(model.decode(model.encode(x)[0])[0]), pixels)


def test_temperature_zero_is_deterministic():
    model = trained_like().eval()
    first, second = model.sample(2, std=0.0), model.sample(2, std=0.0)
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1])


def test_samples_follow_the_generator_and_the_temperature():
    model = trained_like().eval()

    def sample(std=0.7):
        return model.sample(64, std, torch.Generator().manual_seed(3))

    assert torch.equal(sample(), sample())
    assert torch.equal(sample(0.7), sample([0.7, 0.7]))
    assert not torch.equal(sample(), model.sample(64))
    assert sample(0.3).std(dim=0).mean() < 0.6 * sample(0.9).std(dim=0).mean()
    assert sample().shape == (64, 3, 8, 8)
    assert model.sample(0).shape == (0, 3, 8, 8)


@torch.no_grad()
def test_no_images():
    model = trained_like().eval()
    latents, log_det = model.encode(torch.zeros(0, 3, 8, 8))
    assert [tuple(latent.shape) for latent in latents] == [(0, *shape) for shape in model.latent_shapes]
    again, _ = model.decode(latents)
    assert again.shape == (0, 3, 8, 8) and log_det.shape == (0,)


@torch.no_grad()
def test_samples_are_decoded_latents():
    model = trained_like().eval()
    samples = model.sample(3, std=1.0, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    latents = [torch.randn(3, *shape, generator=generator) for shape in model.latent_shapes]
    assert torch.equal(samples, model.decode(latents)[0])
    for latent, again in zip(latents, model.encode(samples)[0]):
        torch.testing.assert_close(again, latent, rtol=0, atol=1e-3)


def test_samples_of_classes():
    model = trained_like(**CLASSES).eval()
    first = model.sample(4, 0.0, labels=LABELS)
    assert torch.equal(first[1], first[3])
    assert not torch.allclose(first[0], first[1])
    drawn = model.sample(32, 0.0, torch.Generator().manual_seed(0))
    assert len(drawn.flatten(1).unique(dim=0)) == 3  # all classes occur
    assert torch.equal(drawn, model.sample(32, 0.0, torch.Generator().manual_seed(0)))


def test_class_changes_only_the_last_latent():
    model = trained_like(**CLASSES).eval()
    *finer, last = model.encode(images(), LABELS)[0]
    *finer_too, other = model.encode(images(), (LABELS + 1) % 3)[0]
    assert all(map(torch.equal, finer, finer_too))
    assert not torch.allclose(last, other)


@torch.no_grad()
def test_state_dict_makes_an_equal_model():
    for keys in ({"PERMUTATION": "shuffle"}, {"PERMUTATION": "1x1_lu"}, {}):
        model = trained_like(**keys).eval()
        torch.manual_seed(9)
        other = Glow.from_config(model.config)
        assert not other.is_initialized
        other.load_state_dict(model.state_dict())
        assert other.train().is_initialized
        assert torch.equal(other.loss(images()), model.loss(images()))
        assert torch.equal(other.sample(2, 0.0), model.sample(2, 0.0))


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied):
    model = trained_like().eval()
    expected = model.loss(images())
    twin = copied(model)
    assert torch.equal(twin.loss(images()), expected)
    for parameter in twin.parameters():
        parameter.add_(0.1)
    assert not torch.allclose(twin.loss(images()), expected)
    assert torch.equal(model.loss(images()), expected)


@torch.no_grad()
@pytest.mark.parametrize("permutation", ["1x1", "1x1_lu", "reverse"])
def test_nothing_stale_is_kept(permutation):
    """Without gradients, folded weights and inverses are kept until a parameter changes."""
    model = trained_like(PERMUTATION=permutation, **CLASSES).eval()
    model.decode(model.encode(images(), LABELS)[0], LABELS)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    fresh = Glow.from_config(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    latents, log_det = model.encode(images(), LABELS)
    assert torch.equal(log_det, fresh.encode(images(), LABELS)[1])
    assert torch.equal(model.decode(latents, LABELS)[0], fresh.decode(latents, LABELS)[0])
    torch.testing.assert_close(model.decode(latents, LABELS)[0], images(), rtol=0, atol=1e-4)


def test_groups_hold_every_parameter_once():
    model = trained_like(**CLASSES)
    groups = model.parameter_groups()
    assert list(groups) == ["flows"]
    assert {id(p) for p in groups["flows"]} == {id(p) for p in model.parameters()}
    assert model.launch_choices() == ()


@pytest.mark.parametrize(("call", "message"), [
    (lambda model: model.loss(torch.zeros(1, 3, 16, 16)), r"shape \(1, 3, 16, 16\); this model takes \(B, 3, 8, 8\)"),
    (lambda model: model.encode(torch.zeros(3, 8, 8)), r"shape \(3, 8, 8\)"),
    (lambda model: model.initialize(torch.zeros(2, 1, 8, 8)), r"shape \(2, 1, 8, 8\)"),
    (lambda model: model.decode([torch.zeros(1, 24, 2, 2)]), "this model's are"),
    (lambda model: model.decode([]), "this model's are"),
    (lambda model: model.loss(images(), labels=LABELS), "has no classes"),
    (lambda model: model.sample(1, labels=LABELS[:1]), "has no classes"),
    (lambda model: model.sample(-1), "n must not be negative, got -1"),
    (lambda model: model.sample(1, std=-1.0), "none of them negative"),
    (lambda model: model.sample(1, std=[1.0, 1.0, 1.0]), "or 2"),
    (lambda model: model.set_precision("fp16"), "Glow.set_precision: 'fp16' is none of fp32, tf32, bf16"),
])
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(trained_like())


@pytest.mark.parametrize(("labels", "message"), [
    (None, "is class-conditional; give labels"),
    (LABELS[:2], r"of shape \(4,\)"),
    (LABELS.float(), "must be integers"),
    (LABELS + 1, "label 3 is none of this model's classes, 0 to 2"),
    (LABELS - 1, "label -1 is none"),
])
def test_mistakes_in_labels(labels, message):
    model = trained_like(**CLASSES)
    with pytest.raises(ValueError, match=message):
        model.loss(images(), labels=labels)
    with pytest.raises(ValueError, match=message):
        model.encode(images(), labels)
    with pytest.raises(ValueError, match=message):
        model.decode([torch.zeros(4, *shape) for shape in model.latent_shapes], labels)


@torch.no_grad()
def test_bf16_networks_decode_what_they_encode():
    model = trained_like(RESOLUTION=16, LEVELS=3, STEPS=4)
    expected = model.loss(images(4, 16))
    model.eval().set_precision("bf16")
    assert model.precision == "bf16"
    latents, log_det = model.encode(images(4, 16))
    assert log_det.dtype == torch.float64
    decoded, log_det_back = model.decode(latents)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, images(4, 16), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-6)
    loss = model.loss(images(4, 16))
    assert loss.dtype == torch.float32
    assert (loss - expected).abs().max() > 1e-4  # what was kept in float32 is not used any more
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_formats_agree(precision):
    """Channels last, too, with the gradients of all parameters."""
    results = []
    for channels_last in (False, True):
        model = trained_like(RESOLUTION=16, **CLASSES).set_precision(precision, channels_last=channels_last)
        loss = model.loss(images(4, 16), labels=LABELS)
        loss.mean().backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    tolerance = {"fp32": 1e-5, "bf16": 0.02}[precision]
    for plain, last in zip(*results):
        scale = plain.abs().max()
        torch.testing.assert_close(last / scale, plain / scale, rtol=0, atol=tolerance)


def test_weights_in_channels_last():
    model = trained_like()
    expected = model.loss(images())
    torch.testing.assert_close(model.to(memory_format=torch.channels_last).loss(images()), expected)


def test_autocast_reaches_networks_only():
    model = trained_like()
    expected = model.loss(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(images())
    assert loss.dtype == torch.float32
    assert not torch.equal(loss, expected)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


def test_small_is_a_model_without_classes():
    model = Glow.from_config(SMALL | {"NUM_CLASSES": 3})
    assert model.num_classes == 0
    assert model.embedding is None


def test_plu_matrices_are_multiplied_in_float64():
    model = trained_like(PERMUTATION="1x1_lu")
    found = [module for module in model.modules() if isinstance(module, StepAffines)]
    for affines in found:
        exact = copy.deepcopy(affines).double().matrices()[0]
        assert torch.equal(affines.matrices()[0], exact.float())
    assert found
