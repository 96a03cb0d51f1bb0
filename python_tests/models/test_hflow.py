"""What users rely on beyond the original's numbers: any batch size, invertibility, determinism, groups, errors."""

from __future__ import annotations

import copy

import pytest
import torch

from hflow_fast import CheckpointError
from hflow_fast.models import HFlow


@pytest.mark.parametrize(("name", "parameters"), [("A-128", 73_775_436), ("A-256", 77_381_708)])
def test_presets_have_the_originals_size(name, parameters):
    with torch.device("meta"):
        model = HFlow.from_config(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_encode_and_decode_any_batch(tiny_model, batch):
    x = torch.rand(batch, 3, 16, 16) - 0.5
    for mode in (True, False):
        latents, log_det = tiny_model.train(mode).encode(x)
        assert [latent.shape[1:] for latent in latents] == [torch.Size(shape) for shape in tiny_model.latent_shapes]
        reconstruction, back = tiny_model.decode(latents)
        torch.testing.assert_close(reconstruction, x, rtol=0, atol=1e-4)
        torch.testing.assert_close(back, -log_det, rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_a_batch_is_its_images(tiny_model, images):
    latents, log_det = tiny_model.encode(images)
    for index, image in enumerate(images):
        single, single_log_det = tiny_model.encode(image[None])
        torch.testing.assert_close(single_log_det, log_det[index : index + 1], rtol=1e-5, atol=1e-3)
        for one, all_of_them in zip(single, latents):
            torch.testing.assert_close(one, all_of_them[index : index + 1], rtol=1e-4, atol=1e-4)


def test_log_det_is_the_jacobian_of_a_level(tiny_model):
    """The finest level's flow, given what lies below, against the autograd Jacobian of the image."""
    model = tiny_model.double().eval()
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64) - 0.5
    level = model.levels[0]
    with torch.no_grad():
        decoded = level.decoder(model.targets(x)[1], None, torch.zeros(1, 4, 8, 8, dtype=torch.float64))
        context = level.context(decoded.features)

    def flow(image: torch.Tensor) -> torch.Tensor:
        return level.flow(image, context, decoded.start, decoded.end)[0]

    jacobian = torch.autograd.functional.jacobian(flow, x, vectorize=True).reshape(768, 768)
    log_det = level.flow(x, context, decoded.start, decoded.end)[1]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_loss_is_finite_with_gradients(tiny_model, batch, noise, training):
    tiny_model.train(training)
    loss = tiny_model.loss(torch.rand(batch, 3, 16, 16) - 0.5, noise=noise)
    assert loss.shape == (batch,)
    loss.mean().backward()
    for name, parameter in tiny_model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_identical_images_have_a_finite_loss(tiny_model):
    x = torch.zeros(2, 3, 16, 16)
    loss = tiny_model.loss(x).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in tiny_model.parameters())


def test_bound_adds_up(tiny_model, images):
    bound = tiny_model.eval().bound(images, noise=False)
    assert set(bound.levels) == {"16", "8", "endblock.0", "endblock.1"}
    nats = sum(bits * bound.terms[name].dims for name, bits in bound.levels.items()) * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(bound.nats, nats)
    torch.testing.assert_close(bound.bits_per_dim(), bound.nats / (768 * torch.log(torch.tensor(2.0))) + 8)


def test_flow_inputs_are_cut_from_the_graph(tiny_model, images):
    """The finest level's target is the image, so its encoder learns through the levels below only."""
    x = images.requires_grad_()
    terms = tiny_model.eval().bound(x, noise=False).terms
    (gradient,) = torch.autograd.grad(terms["16"].log_det.sum(), x, retain_graph=True)
    (cut,) = torch.autograd.grad(terms["endblock.0"].log_prior.sum(), x, allow_unused=True)
    assert gradient.abs().sum() > 0  # through the decoder
    assert cut is None or cut.abs().sum() == 0


def test_initialization_normalises_each_actnorm_once(images):
    torch.manual_seed(0)
    model = HFlow.from_config("tiny-16").eval()
    x = torch.rand(64, 3, 16, 16) - 0.5
    model.initialize(x)
    assert not model.training
    affines = model.levels[0].flow.affines
    assert affines.is_initialized and affines.log_scale.abs().sum() > 0
    before = copy.deepcopy(model.state_dict())
    model.initialize(x * 2)
    model.train().loss(images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_first_actnorm_sees_zero_mean_and_unit_std():
    torch.manual_seed(0)
    model = HFlow.from_config("tiny-16")
    x = torch.rand(64, 3, 16, 16) * 0.5 - 0.5
    model.initialize(x)
    affines = model.levels[0].flow.affines
    # At the start the dense affine's scale is zero and its shift is not the image's business: undo both by hand.
    below, style = model._condition(model.targets(x)[-1])
    _, _, skip = model.levels[1].encode(model.targets(x)[1], below, style, None)
    start = model.levels[0].decoder(model.targets(x)[1], style, skip).start
    centred = x * 4 - start[:, 3:]
    z = (centred - affines.bias[0].view(1, 3, 1, 1)) * torch.exp(-affines.log_scale[0]).view(1, 3, 1, 1)
    # The decoder's training noise differs between the two passes, so the agreement is statistical.
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=0.2)
    torch.testing.assert_close(z.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=0.2)


def test_state_dict_keeps_initialisation(tiny_model, images):
    clone = HFlow.from_config("tiny-16")
    clone.load_state_dict(tiny_model.state_dict())
    assert all(level.flow.affines.is_initialized for level in clone.levels)
    torch.testing.assert_close(clone.loss(images, noise=False), tiny_model.loss(images, noise=False))


def test_samples_follow_the_generator(tiny_model):
    first, again, other = (tiny_model.sample(3, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert first.shape == (3, 3, 16, 16)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert tiny_model.sample(0).shape == (0, 3, 16, 16)


@torch.no_grad()
def test_caches_follow_the_weights(tiny_model, images):
    """Whatever changes the weights, encode and decode use the new ones."""
    tiny_model.double().eval()
    images = images.double()

    def check(before: list[torch.Tensor]) -> list[torch.Tensor]:
        latents, _ = tiny_model.encode(images)
        assert not torch.equal(latents[0], before[0])
        torch.testing.assert_close(tiny_model.decode(latents)[0], images, rtol=0, atol=1e-6)
        return latents

    latents = tiny_model.encode(images)[0]
    with torch.enable_grad():
        optimizer = torch.optim.Adam(tiny_model.parameters(), lr=1e-2)
        tiny_model.loss(images).mean().backward()
        optimizer.step()
    latents = check(latents)
    tiny_model.load_state_dict({name: value * 1.01 if value.is_floating_point() else value
                                for name, value in tiny_model.state_dict().items()})
    latents = check(latents)
    torch._foreach_lerp_(list(tiny_model.parameters()), [torch.rand_like(p) for p in tiny_model.parameters()], 0.01)
    latents = check(latents)
    for parameter in tiny_model.parameters():
        parameter.data = parameter.data * 1.01
    latents = check(latents)
    single = copy.deepcopy(tiny_model).float()
    assert single.encode(images.float())[0][0].dtype == torch.float32


def test_parameter_groups_partition_the_parameters(original_model):
    groups = original_model.parameter_groups()
    grouped = [parameter for group in groups.values() for parameter in group]
    assert len(grouped) == len(set(grouped)) == len(list(original_model.parameters()))
    # The original sorts by the substrings conv_e and conv_d of its names.
    from hflow_fast.models.hflow.original import original_names

    names = original_names(original_model)
    for name, parameter in original_model.named_parameters():
        source = names[name] if isinstance(names[name], str) else names[name][0]
        expected = "encoders" if "conv_e" in source else "decoders" if "conv_d" in source else "flows"
        assert any(parameter is member for member in groups[expected]), name


def test_wrong_shapes_are_explained(tiny_model):
    with pytest.raises(ValueError, match=r"takes \(B, 3, 16, 16\)"):
        tiny_model.loss(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="finest level first"):
        tiny_model.decode([torch.zeros(2, 3, 16, 16)])


def test_wrong_weights_are_explained(original_config, original_weights):
    missing = dict(original_weights)
    del missing["global_state.fc1.w"]
    with pytest.raises(CheckpointError, match="1 missing.*global_state.fc1.w"):
        HFlow.from_original(original_config, missing)
    with pytest.raises(CheckpointError, match="surplus"):
        HFlow.from_original(original_config, original_weights | {"surplus": torch.zeros(1)})
    misshapen = original_weights | {"global_state.fc1.w": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match="global_state.fc1.w"):
        HFlow.from_original(original_config, misshapen)
