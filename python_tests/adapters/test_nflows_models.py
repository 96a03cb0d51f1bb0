"""Whole models built with nflows, before and after: likelihoods, samples, saving, fusing across neighbours."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hflow_fast.adapters import accelerate, restore

from .conftest import accelerated, assert_same, perturbed

nflows = pytest.importorskip("nflows")

from nflows import distributions, flows, transforms  # noqa: E402
from nflows.flows.realnvp import SimpleRealNVP  # noqa: E402
from nflows.nn.nets import ConvResidualNet, ResidualNet  # noqa: E402
from nflows.utils import torchutils  # noqa: E402

Mask = Callable[[int], Tensor]


def conv_net(inputs: int, outputs: int) -> nn.Module:
    return ConvResidualNet(inputs, outputs, hidden_channels=5, num_blocks=1)


def step(channels: int, mask: Mask, coupling: type[nn.Module]) -> list[nn.Module]:
    return [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels), coupling(mask(channels), conv_net)]


def glow(mask: Mask = torchutils.create_mid_split_binary_mask,
         coupling: type[nn.Module] = transforms.AffineCouplingTransform, nested: bool = True) -> nn.Module:
    """Multi-scale, as in "Neural Spline Flows" (Durkan et al., 2019), whose authors wrote nflows."""
    levels, steps, shape = 2, 2, (1, 8, 8)
    whole = transforms.MultiscaleCompositeTransform(num_transforms=levels)
    channels, height, width = shape
    for _ in range(levels):
        squeeze = transforms.SqueezeTransform()
        channels, height, width = squeeze.get_output_shape(channels, height, width)
        layers = [step(channels, mask, coupling) for _ in range(steps)]
        flat = [transforms.CompositeTransform(layer) for layer in layers] if nested else sum(layers, [])
        level = transforms.CompositeTransform([squeeze, *flat, transforms.OneByOneConvolution(channels)])
        hidden = whole.add_transform(level, (channels, height, width))
        if hidden is not None:
            channels, height, width = hidden
    return flows.Flow(whole, distributions.StandardNormal([64]))


def real_nvp(batch_norm: bool = False, additive: bool = False, features: int = 6) -> nn.Module:
    return SimpleRealNVP(features, hidden_features=7, num_layers=4, num_blocks_per_layer=1,
                         use_volume_preserving=additive, batch_norm_between_layers=batch_norm)


def tabular() -> nn.Module:
    """Linear layers between couplings, an inverse inside, splines that stay, and a context."""
    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=6, context_features=2, num_blocks=1)

    def block() -> list[nn.Module]:
        return [transforms.ReversePermutation(5), transforms.LULinear(5, identity_init=False),
                transforms.AffineCouplingTransform(torchutils.create_alternating_binary_mask(5), net)]

    return flows.Flow(
        transforms.CompositeTransform([
            *block(), transforms.InverseTransform(transforms.CompositeTransform([*block(), transforms.ActNorm(5)])),
            transforms.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0, 1, 0], net, tails="linear"),
            *block(), transforms.RandomPermutation(5)]),
        distributions.StandardNormal([5]))


IMAGES, VECTORS = (5, 1, 8, 8), (5, 6)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "glow": (glow, IMAGES, False),
    "glow-flat-alternating": (lambda: glow(torchutils.create_alternating_binary_mask, nested=False), IMAGES, False),
    "glow-additive": (lambda: glow(coupling=transforms.AdditiveCouplingTransform), IMAGES, False),
    "real-nvp": (real_nvp, VECTORS, False),
    "real-nvp-odd": (lambda: real_nvp(features=5), (5, 5), False),
    "real-nvp-wide": (lambda: real_nvp(features=40), (5, 40), False),
    "nice-batch-norm": (lambda: real_nvp(batch_norm=True, additive=True), VECTORS, False),
    "tabular": (tabular, (5, 5), True),
}
each_model = pytest.mark.parametrize("name", MODELS)


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model as after some training, and what its log_prob takes."""
    build, shape, conditional = MODELS[name]
    torch.manual_seed(0)
    model = build().train()
    inputs = (torch.randn(shape), torch.randn(shape[0], 2)) if conditional else (torch.randn(shape),)
    for module in model.modules():
        if isinstance(module, transforms.ActNorm) and not module.initialized:
            module.initialized.fill_(True)
    with torch.no_grad():
        model.log_prob(*inputs)
    return perturbed(model).to(dtype).eval(), tuple(tensor.to(dtype) for tensor in inputs)


def log_prob(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model.log_prob(*inputs)


def sampled(model: nn.Module, *context: Tensor) -> tuple[Tensor, Tensor]:
    return model.sample(3, *context), model.sample_and_log_prob(2, *context)


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_likelihoods_and_gradients(name: str, dtype: torch.dtype) -> None:
    stock, inputs = built(name, dtype)
    fast, report = accelerated(stock)
    assert report.replaced
    assert_same(stock, fast, *inputs, call=log_prob, rtol=2e-5 if dtype == torch.float32 else 1e-11)
    assert_same(stock, fast, *(tensor[:1] for tensor in inputs), call=log_prob,
                rtol=2e-5 if dtype == torch.float32 else 1e-11)


@each_model
def test_samples_of_the_same_seed(name: str) -> None:
    stock, inputs = built(name)
    fast, _ = accelerated(stock)
    assert_same(stock, fast, *inputs[1:], call=sampled, rtol=1e-4, exact=False)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = stock.sample(4, *inputs[1:])
        torch.manual_seed(1)
        torch.testing.assert_close(fast.sample(4, *inputs[1:]), expected, rtol=1e-4, atol=1e-4)


@each_model
def test_latents_and_back(name: str) -> None:
    stock, inputs = built(name, torch.float64)
    fast, _ = accelerated(stock)
    with torch.no_grad():
        for _ in range(2):
            z, log_det = fast._transform(inputs[0], context=inputs[1] if inputs[1:] else None)
            x, back = fast._transform.inverse(z, *inputs[1:])
            torch.testing.assert_close(x, inputs[0])
            torch.testing.assert_close(back, -log_det)


@each_model
def test_report(name: str) -> None:
    stock, _ = built(name)
    fast, report = accelerated(stock)
    left = {layer.kind for layer in report.left}
    assert left == {"nice-batch-norm": {"nflows.BatchNorm"},
                    "tabular": {"nflows.PiecewiseRationalQuadraticCouplingTransform"}}.get(name, set())
    assert not accelerate(fast).replaced
    assert restore(fast) == [layer.name for layer in report.replaced]
    assert [type(module) for module in fast.modules()] == [type(module) for module in stock.modules()]
    assert "hflow_fast" not in "".join(type(value).__module__ for module in fast.modules()
                                       for value in vars(module).values())


@each_model
def test_training_goes_on_and_its_state_fits_the_stock_model(name: str) -> None:
    stock, inputs = built(name)
    fast = copy.deepcopy(stock)
    optimizers = {model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in (stock, fast)}
    accelerate(fast)
    for _ in range(3):
        for model, optimizer in optimizers.items():
            optimizer.zero_grad()
            (-model.log_prob(*inputs).mean()).backward()
            optimizer.step()
    with torch.no_grad():
        expected = fast.log_prob(*inputs)
        torch.testing.assert_close(expected, stock.log_prob(*inputs), rtol=1e-4, atol=1e-3)
        saved = io.BytesIO()
        torch.save(fast.state_dict(), saved)
        saved.seek(0)
        other = MODELS[name][0]().eval()
        other.load_state_dict(torch.load(saved))
        torch.testing.assert_close(other.log_prob(*inputs), expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(copy.deepcopy(fast).log_prob(*inputs), expected)


@pytest.mark.parametrize("name", ["glow", "glow-flat-alternating"])
def test_one_pass_between_two_networks(name: str, passes: list[str]) -> None:
    model, inputs = built(name)
    accelerate(model)
    with torch.no_grad():
        model.log_prob(*inputs)
        level = ["conv1x1", "flow_step", "flow_step"]
        assert passes == level * 2
        passes.clear()
        model.sample(2)
    # The matrix in front, the networks' couplings, each with the maps behind it.
    assert passes == level * 2


def test_permutations_between_couplings_are_free(passes: list[str]) -> None:
    model, inputs = built("real-nvp")
    accelerate(model)
    model.log_prob(*inputs)
    assert passes == ["flow_step"] * 4


def test_batches_of_none_and_bf16_networks() -> None:
    model, (x,) = built("glow")
    stock = copy.deepcopy(model)
    accelerate(model)
    z, log_det = model._transform._transforms[0](x[:0])
    assert z.shape == (0, 4, 4, 4) and log_det.shape == (0,)
    assert model._transform._transforms[0].inverse(z)[0].shape == (0, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.log_prob(x)
    assert got.dtype == stock.log_prob(x).dtype
    torch.testing.assert_close(got, stock.log_prob(x), rtol=2e-2, atol=0.5)


def test_hooks_added_later_are_called() -> None:
    model, (x,) = built("glow")
    expected = model.log_prob(x)
    accelerate(model)
    seen = []
    for module in model.modules():
        if isinstance(module, (transforms.ActNorm, transforms.AffineCouplingTransform)):
            module.register_forward_hook(lambda module, inputs, outputs: seen.append(type(module).__name__))
    torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-4, atol=1e-3)
    assert seen == ["ActNorm", "AffineCouplingTransform"] * 4


def test_layers_with_hooks_stay_and_the_rest_is_fused(passes: list[str]) -> None:
    model, (x,) = built("glow")
    expected = model.log_prob(x)
    hooked = model._transform._transforms[0]._transforms[1]._transforms[0]
    seen = []
    hooked.register_forward_hook(lambda *arguments: seen.append(1))
    report = accelerate(model)
    assert [layer.kind for layer in report.left] == ["nflows.ActNorm"]
    torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-4, atol=1e-3)
    assert seen == [1]
    assert passes.count("flow_step") == 4


def test_actnorms_initialise_layer_by_layer_and_fuse_after() -> None:
    torch.manual_seed(0)
    stock = glow().train()
    fast = copy.deepcopy(stock)
    report = accelerate(fast)
    assert {layer.kind for layer in report.left} == {"nflows.ActNorm"}
    x = torch.randn(16, 1, 8, 8) * 2 + 1
    with torch.no_grad():
        torch.testing.assert_close(fast.log_prob(x), stock.log_prob(x), rtol=1e-4, atol=1e-3)
    for (name, expected), got in zip(stock.state_dict().items(), fast.state_dict().values()):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=name)
    again = accelerate(fast)
    assert {layer.kind for layer in again.replaced} == {"nflows.ActNorm"}
    assert not again.left
    assert_same(stock, fast, x, call=log_prob, rtol=1e-4)


def test_compiled_after() -> None:
    model, (x,) = built("glow")
    level = model._transform._transforms[0]._transforms[1]
    x = x.view(-1, 4, 4, 4)
    expected = level(x)
    accelerate(level)
    level(x)
    compiled = torch.compile(level.forward, backend="aot_eager", fullgraph=True)
    for got, value in zip(compiled(x), expected):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)
