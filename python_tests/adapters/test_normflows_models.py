"""Whole models built with normflows, before and after: training, sampling, saving, going on with an optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hflow_fast.adapters import accelerate, restore
from hflow_fast.nn import _fusion

from .conftest import accelerated, assert_same, perturbed

nf = pytest.importorskip("normflows")

CLASSES = 3


class Doubling(nf.flows.Flow):
    """A transform of somebody's own."""

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * z, z.new_full((len(z),), z[0].numel() * math.log(2))

    def inverse(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return z / 2, z.new_full((len(z),), -z[0].numel() * math.log(2))


def multiscale_glow(use_lu: bool = True, net_actnorm: bool = False, class_cond: bool = True, scale: bool = True,
                    transform: bool = False, levels: int = 2, steps: int = 2) -> nn.Module:
    """As in the library's own Glow example."""
    bases, merges, flows, channels, size = [], [], [], 1, 8
    for level in range(levels):
        flows.append([nf.flows.GlowBlock(channels * 2 ** (levels + 1 - level), 6, scale=scale, use_lu=use_lu,
                                         net_actnorm=net_actnorm) for _ in range(steps)] + [nf.flows.Squeeze()])
        latent = (channels * 2 ** (levels - level), size // 2 ** (levels - level), size // 2 ** (levels - level))
        if level > 0:
            merges.append(nf.flows.Merge())
        else:
            latent = (2 * latent[0], *latent[1:])
        bases.append(nf.distributions.ClassCondDiagGaussian(latent, CLASSES) if class_cond
                     else nf.distributions.GlowBase(latent))
    return nf.MultiscaleFlow(bases, flows, merges, Doubling() if transform else None, class_cond)


def real_nvp() -> nn.Module:
    """For vectors, as in the library's README: couplings and swaps, here with actnorms."""
    flows = []
    for _ in range(3):
        flows += [nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 4])), nf.flows.Permute(5, mode="swap"),
                  nf.flows.ActNorm(5), nf.flows.Permute(5)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(5), flows)


def checkerboards() -> nn.Module:
    """RealNVP for images: checkerboards, squeeze, channels."""
    def coupled(mode: str, passive: int, active: int) -> nn.Module:
        return nf.flows.AffineCouplingBlock(nf.nets.ConvNet2d([passive, 6, 2 * active], (3, 3)), split_mode=mode)

    flows = [coupled("channel", 4, 4), coupled("channel_inv", 4, 4), nf.flows.Invertible1x1Conv(8), nf.flows.Squeeze(),
             coupled("checkerboard", 2, 2), coupled("checkerboard_inv", 2, 2), nf.flows.ActNorm((2, 1, 1))]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian((8, 4, 4)), flows)


def class_conditional() -> nn.Module:
    flows = [nf.flows.GlowBlock(4, 6), nf.flows.GlowBlock(4, 6), nf.flows.Squeeze()]
    return nf.ClassCondFlow(nf.distributions.ClassCondDiagGaussian((4, 4, 4), CLASSES), flows)


IMAGES, VECTORS = (6, 2, 8, 8), (6, 5)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "glow": (multiscale_glow, (6, 1, 8, 8), True),
    "glow-plain": (lambda: multiscale_glow(use_lu=False, net_actnorm=True, class_cond=False), (6, 1, 8, 8), False),
    "glow-additive": (lambda: multiscale_glow(scale=False, transform=True), (6, 1, 8, 8), True),
    "real-nvp": (real_nvp, VECTORS, False),
    "checkerboards": (checkerboards, IMAGES, False),
    "class-conditional": (class_conditional, (6, 1, 8, 8), True),
}
each_model = pytest.mark.parametrize("name", MODELS)


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple]:
    """A model as after some training, and what its log_prob takes."""
    build, shape, classes = MODELS[name]
    torch.manual_seed(0)
    model = build()
    batch = (torch.randn(shape), *((torch.arange(shape[0]) % CLASSES,) if classes else ()))
    log_prob(model, *batch)
    return perturbed(model).to(dtype), (batch[0].to(dtype), *batch[1:])


def log_prob(model: nn.Module, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    return model.log_prob(x) if isinstance(model, nf.NormalizingFlow) else model.log_prob(x, y)


def loss(model: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
    return model.forward_kld(*batch)


def there_and_back(model: nn.Module, x: torch.Tensor, y: torch.Tensor | None = None) -> list:
    """What the models have beside likelihoods and samples."""
    if isinstance(model, nf.ClassCondFlow):
        return []
    z, log_det = model.inverse_and_log_det(x)
    whole = [model.inverse(x), model.forward(z)] if isinstance(model, nf.NormalizingFlow) else [model(x, y)]
    return [z, log_det, *model.forward_and_log_det(z), *whole]


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_training(name: str, dtype: torch.dtype) -> None:
    stock, batch = built(name, dtype)
    fast, report = accelerated(stock)
    assert report.replaced[0].name == "" and "Squeeze" in str(report) or name == "real-nvp"
    rtol = 2e-5 if dtype is torch.float32 else 1e-10
    assert_same(stock, fast, *batch, call=log_prob, rtol=rtol)
    assert_same(stock, fast, *(part[:1] for part in batch), call=log_prob, rtol=rtol)
    # The stock NormalizingFlow adds up these in the default dtype, whatever its own.
    single = isinstance(stock, nf.NormalizingFlow) and dtype is torch.float64
    assert_same(stock, fast, *batch, call=loss, rtol=1e-5 if single else rtol, exact=not single)
    assert_same(stock, fast, *batch, call=there_and_back, rtol=1e-5 if single else rtol, exact=not single)


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sampling(name: str, dtype: torch.dtype) -> None:
    stock, batch = built(name, dtype)
    fast, _ = accelerated(stock)

    def sample(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        return model.sample(4)

    rtol = 2e-4 if dtype is torch.float32 else 1e-10
    assert_same(stock, fast, call=sample, rtol=rtol, exact=False)  # with gradients
    with torch.no_grad():
        for _ in range(2):
            assert_same(stock, fast, call=sample, rtol=rtol, exact=False)
        if len(batch) > 1:
            assert_same(stock, fast, call=lambda model: model.sample(3, y=torch.arange(3)), rtol=rtol, exact=False)
        x, log_q = fast.sample(4)
        assert x.dtype == log_q.dtype == dtype


def test_temperature() -> None:
    stock, _ = built("glow")
    fast, _ = accelerated(stock)
    with torch.no_grad():
        assert_same(stock, fast, call=lambda model: model.sample(3, temperature=0.7), rtol=2e-4, exact=False)
        torch.testing.assert_close(*([model.q0[0].temperature for model in (stock, fast)]))


def test_reverse_kld_runs_through_fast_layers() -> None:
    stock, _ = built("real-nvp")
    stock.p = nf.distributions.DiagGaussian(5)
    fast, _ = accelerated(stock)
    assert_same(stock, fast, call=lambda model: model.reverse_kld(8), rtol=1e-4, exact=False)


@each_model
def test_state_goes_both_ways(name: str) -> None:
    stock, batch = built(name)
    fast, _ = accelerated(stock)
    assert list(fast.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        log_prob(fast, *batch)
        perturbed(fast, seed=5)
        stock.load_state_dict(fast.state_dict())
        torch.testing.assert_close(log_prob(fast, *batch), log_prob(stock, *batch), rtol=1e-4, atol=1e-3)
        fresh, _ = built(name)
        perturbed(fresh, seed=6)
        fast.load_state_dict(fresh.state_dict())
        torch.testing.assert_close(log_prob(fast, *batch), log_prob(fresh, *batch), rtol=1e-4, atol=1e-3)


@each_model
def test_copies_and_pickles(name: str) -> None:
    stock, batch = built(name)
    fast, _ = accelerated(stock)
    with torch.no_grad():
        expected = log_prob(fast, *batch)
        fast.sample(2)
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
            assert [type(module) for module in again.modules()] == [type(module) for module in fast.modules()]
            assert torch.equal(log_prob(again, *batch), expected)
            perturbed(again, seed=3)
            assert not torch.equal(log_prob(again, *batch), expected)
        assert torch.equal(log_prob(fast, *batch), expected)
    restore(fast)
    assert torch.equal(log_prob(fast, *batch), log_prob(stock, *batch))


@each_model
def test_an_optimizer_goes_on(name: str) -> None:
    stock, batch = built(name)
    other = copy.deepcopy(stock)
    parameters = list(other.parameters())
    for model in (stock, other):
        model.optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(4):
        if step == 2:
            accelerate(other)
            assert all(one is two for one, two in zip(other.parameters(), parameters, strict=True))
        for model in (stock, other):
            model.train(step % 2 == 0)
            model.optimizer.zero_grad()
            loss(model, *batch).backward()
            model.optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(log_prob(other, *batch), log_prob(stock, *batch), rtol=1e-3, atol=1e-2)


@each_model
def test_before_the_first_batch(name: str) -> None:
    build, shape, _ = MODELS[name]
    _, batch = built(name)
    torch.manual_seed(0)
    stock = build()
    fast, report = accelerated(stock)
    left = [layer for layer in report.left if "not initialised" in layer.reason]
    assert len(left) == sum(type(module) is nf.flows.ActNorm for module in stock.modules()) > 0
    torch.testing.assert_close(log_prob(fast, *batch), log_prob(stock, *batch), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(fast.state_dict(), stock.state_dict(), rtol=1e-4, atol=1e-4)
    assert len(accelerate(fast).replaced) == len(left)
    assert_same(stock, fast, *batch, call=log_prob, rtol=1e-3)


def test_blocks_share_passes(monkeypatch) -> None:
    """Between two networks there is one pass, and matrices of all blocks are assembled together."""
    stock, batch = built("glow")
    fast, _ = accelerated(stock)
    counts = dict.fromkeys(("flow_step", "conv1x1", "coupling"), 0)
    for op in counts:
        def counted(*arguments, op=op, function=getattr(_fusion, op), **options):
            counts[op] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(_fusion, op, counted)
    log_prob(fast, *batch)
    assert counts == {"conv1x1": 2, "flow_step": 2, "coupling": 2}  # two levels of two blocks
    with torch.no_grad():
        fast.sample(2)
    assert counts == {"conv1x1": 2, "flow_step": 6, "coupling": 2}


def test_a_changed_list_of_flows_is_noticed() -> None:
    stock, batch = built("real-nvp")
    fast, _ = accelerated(stock)
    with torch.no_grad():
        log_prob(fast, *batch)
        for model in (stock, fast):
            torch.manual_seed(2)
            model.flows[1] = nf.flows.Permute(5, "shuffle")
        accelerate(fast)
        torch.testing.assert_close(log_prob(fast, *batch), log_prob(stock, *batch))
        for model in (stock, fast):
            del model.flows[4]
        torch.testing.assert_close(log_prob(fast, *batch), log_prob(stock, *batch))


def test_compiled_after() -> None:
    stock, _ = built("glow")
    stock, x = stock.flows[0][0], torch.randn(2, 8, 2, 2)
    fast, _ = accelerated(stock)
    fast.inverse(x)
    compiled = torch.compile(lambda x: fast.inverse(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock.inverse(x), rtol=1e-4, atol=1e-3)


def test_models_without_known_flows_stay() -> None:
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [nf.flows.Planar((2,))])
    report = accelerate(model)
    assert not report.replaced
    assert {layer.reason for layer in report.left} == {"has no layer with a fused form", "has no fused form"}
