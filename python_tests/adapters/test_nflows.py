"""Every layer of nflows against itself, both directions, values and gradients; what stays, and why."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hflow_fast.adapters import accelerate

from .conftest import accelerated, assert_same, perturbed

nflows = pytest.importorskip("nflows")

from nflows import transforms  # noqa: E402
from nflows.nn.nets import ConvResidualNet, ResidualNet  # noqa: E402
from nflows.utils import torchutils  # noqa: E402

IMAGE, ODD, VECTORS = (3, 4, 2, 6), (3, 5, 2, 6), (4, 6)


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE


def conv_net(inputs: int, outputs: int) -> nn.Module:
    return ConvResidualNet(inputs, outputs, hidden_channels=4, num_blocks=1)


def net(inputs: int, outputs: int) -> nn.Module:
    return ResidualNet(inputs, outputs, hidden_features=6, num_blocks=1)


def with_indices(permutation: list[int]) -> nn.Module:
    return transforms.Permutation(torch.tensor(permutation))


ALTERNATING, FIRST_HALF = torchutils.create_alternating_binary_mask, torchutils.create_mid_split_binary_mask
CASES = [
    Case("actnorm", lambda: transforms.ActNorm(4)),
    Case("actnorm-vectors", lambda: transforms.ActNorm(6), VECTORS),
    Case("actnorm-spread", lambda: transforms.ActNorm(1)),
    Case("invconv", lambda: transforms.OneByOneConvolution(4)),
    Case("invconv-random", lambda: transforms.OneByOneConvolution(5, identity_init=False), ODD),
    Case("invconv-one-channel", lambda: transforms.OneByOneConvolution(1), (3, 1, 2, 6)),
    Case("invconv-many", lambda: transforms.OneByOneConvolution(40), (2, 40, 2, 2)),
    Case("lu", lambda: transforms.LULinear(6, identity_init=False), VECTORS),
    Case("lu-many", lambda: transforms.LULinear(70), (3, 70)),
    Case("affine-last-half", lambda: transforms.AffineCouplingTransform([0, 0, 1, 1], conv_net)),
    Case("affine-first-half", lambda: transforms.AffineCouplingTransform(FIRST_HALF(4), conv_net)),
    Case("affine-alternating", lambda: transforms.AffineCouplingTransform(ALTERNATING(4), conv_net)),
    Case("affine-odd", lambda: transforms.AffineCouplingTransform(ALTERNATING(5), conv_net), ODD),
    Case("affine-odd-other", lambda: transforms.AffineCouplingTransform(ALTERNATING(5, even=False), conv_net), ODD),
    Case("affine-any-half", lambda: transforms.AffineCouplingTransform([0, 1, 1, 0, 1, 0], net), VECTORS),
    Case("affine-many", lambda: transforms.AffineCouplingTransform(ALTERNATING(40), net), (3, 40)),
    Case("additive", lambda: transforms.AdditiveCouplingTransform(ALTERNATING(4), conv_net)),
    Case("additive-vectors", lambda: transforms.AdditiveCouplingTransform(FIRST_HALF(6), net), VECTORS),
    Case("permutation", lambda: with_indices([2, 0, 3, 1])),
    Case("permutation-random", lambda: transforms.RandomPermutation(4)),
    Case("permutation-reverse", lambda: transforms.ReversePermutation(6), VECTORS),
    Case("squeeze", lambda: transforms.SqueezeTransform()),
    Case("squeeze-3", lambda: transforms.SqueezeTransform(3), (2, 4, 3, 6)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def built(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """As after some training."""
    torch.manual_seed(0)
    model = case.build()
    if isinstance(model, transforms.ActNorm):
        model.initialized.fill_(True)
    return perturbed(model).to(dtype).eval()


def to_latent(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return model(x)


def to_data(model: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    return model.inverse(z)


def inputs_of(case: Case, inverse: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = case.shape
    if inverse and "squeeze" in case.name:
        factor = case.build().factor
        shape = (shape[0], shape[1] * factor**2, shape[2] // factor, shape[3] // factor)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_same_as_stock(case: Case, dtype: torch.dtype) -> None:
    stock = built(case, dtype)
    fast, report = accelerated(stock)
    assert [layer.name for layer in report.replaced][:1] == [""]
    assert type(fast).__module__.startswith("hflow_fast.")
    for call in (to_latent, to_data):
        rtol = 1e-5 if dtype == torch.float32 else 1e-11
        assert_same(stock, fast, inputs_of(case, call is to_data, dtype), call=call, rtol=rtol)


@each_case
@torch.no_grad()
def test_one_sample_without_gradients_and_changing_weights(case: Case) -> None:
    stock = built(case)
    fast, _ = accelerated(stock)
    for _ in range(2):
        for call, inverse in ((to_latent, False), (to_data, True)):
            x = inputs_of(case, inverse)[:1]
            for got, expected in zip(call(fast, x), call(stock, x)):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for parameter, twin in zip(stock.parameters(), fast.parameters()):
            parameter.data.mul_(1.1)  # which leaves no trace
            twin.data.mul_(1.1)


@each_case
def test_copies_pickles_and_state(case: Case) -> None:
    stock = built(case)
    fast, _ = accelerated(stock)
    x = inputs_of(case, False)
    expected = fast(x)[0]
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(again) is type(fast)
        assert torch.equal(again(x)[0], expected)
    other = case.build().eval()
    other.load_state_dict(fast.state_dict())
    torch.testing.assert_close(other(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_loading_another_mask_and_permutation() -> None:
    couplings = [transforms.AffineCouplingTransform(mask, net) for mask in ([0, 1, 0, 1], [1, 1, 0, 0])]
    permutations = [with_indices([1, 2, 0, 3]), with_indices([3, 1, 0, 2])]
    convolutions = [transforms.OneByOneConvolution(4, identity_init=False) for _ in range(2)]
    for (mine, other), shape in ((couplings, (3, 4)), (permutations, (3, 4)), (convolutions, (3, 4, 2, 2))):
        perturbed(other)
        x = torch.randn(shape)
        accelerate(mine)
        mine(x)
        with torch.no_grad():
            mine(x)
            mine.load_state_dict(other.state_dict())
            torch.testing.assert_close(mine(x)[0], other(x)[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("using_cache", [False, True])
def test_loading_nothing_but_another_permutation(using_cache: bool) -> None:
    stock = perturbed(transforms.OneByOneConvolution(4, using_cache)).eval()
    fast, _ = accelerated(stock)
    x = torch.randn(2, 4, 2, 2)
    fast(x)
    for layer in (stock, fast):
        layer.permutation._permutation.copy_(layer.permutation._permutation.roll(1))
    for call in (to_latent, to_data):
        torch.testing.assert_close(call(fast, x)[0], call(stock, x)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_using_cache_keeps_weights_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = perturbed(transforms.OneByOneConvolution(4, using_cache=True)).eval()
    fast, _ = accelerated(stock)
    assembled = []
    function = type(fast)._assembled.__func__
    monkeypatch.setattr(type(fast), "_assembled", classmethod(lambda cls, *arguments: (
        assembled.append(1), function(cls, *arguments))[1]))
    x = torch.randn(2, 4, 2, 2)
    for change in (False, True):
        for _ in range(2):
            for call in (to_latent, to_data):
                for got, expected in zip(call(fast, x), call(stock, x)):
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert len(assembled) == (4 if change else 2)
        for layer in (stock, fast):
            layer.lower_entries.add_(0.1)
            layer.train().eval()
    fast.train()(x), fast(x)
    assert len(assembled) == 6


def test_actnorm_initialises_when_told_to() -> None:
    stock = built(CASES[0])
    fast, _ = accelerated(stock)
    x = torch.randn(8, 4, 3, 3) * 3 + 1
    for model in (stock, fast):
        model.initialized.fill_(False)
        model(x)  # in eval mode: nothing happens
        assert not model.initialized
        model.train()
    assert_same(stock, fast, x, exact=False)
    assert fast.initialized
    torch.testing.assert_close(fast(x)[0].mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)


def test_inverse_of_badly_conditioned_weights_is_exact_to_the_condition() -> None:
    layer = transforms.OneByOneConvolution(8).eval()
    with torch.no_grad():
        layer.upper_entries.normal_(0, 1, generator=torch.Generator().manual_seed(3))
        layer.lower_entries.normal_(0, 1, generator=torch.Generator().manual_seed(4))
    accelerate(layer)
    x = torch.randn(2, 8, 4, 4)
    weight = layer.double().weight()
    condition = torch.linalg.cond(weight).item()
    layer.float()
    assert condition > 100
    off = (layer.inverse(layer(x)[0])[0] - x).abs().max()
    assert off < 20 * condition * 2**-24


def test_stock_does_what_parts_do_not() -> None:
    vectors = built(Case("lu", lambda: transforms.LULinear(6, identity_init=False)))
    fast, _ = accelerated(vectors)
    assert_same(vectors, fast, torch.randn(2, 3, 6), call=lambda model, x: model.weight() @ x.mT)
    for layer, x in ((transforms.OneByOneConvolution(4), torch.randn(2, 4)),
                     (transforms.ActNorm(4), torch.randn(2, 4, 3)),
                     (transforms.SqueezeTransform(), torch.randn(1, 2, 3, 4)),
                     (transforms.AffineCouplingTransform([0, 1], net), torch.randn(2, 3))):
        if isinstance(layer, transforms.ActNorm):
            layer.initialized.fill_(True)
        with pytest.raises(ValueError) as expected:
            layer(x)
        accelerate(layer)
        with pytest.raises(ValueError, match="^" + str(expected.value).replace(".", r"\.") + "$"):
            layer(x)


class Edited(transforms.AffineCouplingTransform):
    pass


class Own(transforms.Transform):
    pass


def general_scale() -> nn.Module:
    """As of releases after 0.14, where the scale is an argument."""
    layer = transforms.AffineCouplingTransform([0, 1], net)
    layer.scale_activation = lambda s: nn.functional.softplus(s).clamp(0, 3)
    return layer


@pytest.mark.parametrize(("build", "reason"), [
    (lambda: transforms.ActNorm(4), "not initialised"),
    (lambda: transforms.ActNorm(4).eval(), "not initialised"),
    (lambda: transforms.AffineCouplingTransform([0, 1, 1, 1], net), "transforms 3 of 4 features"),
    (lambda: transforms.AffineCouplingTransform([0, 0, 0, 1], net), "transforms 1 of 4 features"),
    (lambda: transforms.AffineCouplingTransform(
        [0, 1], net, lambda features: transforms.PiecewiseLinearCDF([features])), "unconditional transform"),
    (general_scale, "scale_activation"),
    (lambda: Edited([0, 1], net), "subclass"),
    (Own, "no fused form"),
    (lambda: transforms.PiecewiseRationalQuadraticCouplingTransform([0, 1], net), "no fused form"),
    (lambda: transforms.ReversePermutation(3, dim=2), "dimension 2"),
    (lambda: transforms.NaiveLinear(3), "no fused form"),
])
def test_what_stays(build: Callable[[], nn.Module], reason: str) -> None:
    layer = build()
    kind, before = type(layer), copy.deepcopy(layer.state_dict())
    report = accelerate(layer)
    assert type(layer) is kind
    assert not report.replaced
    assert any(left.name == "" and reason in left.reason for left in report.left)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_default_scale_activation_of_later_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    default = lambda s: torch.sigmoid(s + 2) + 1e-3  # noqa: E731
    monkeypatch.setattr(transforms.AffineCouplingTransform, "DEFAULT_SCALE_ACTIVATION", default, raising=False)
    layer = transforms.AffineCouplingTransform([0, 1], net)
    layer.scale_activation = default
    assert accelerate(layer).replaced
