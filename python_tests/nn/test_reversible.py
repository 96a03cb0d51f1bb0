"""Chains whose activations are rebuilt in the backward pass: gradients, memory, all that must be the same twice."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hflow_fast._memory import SavedBytes, peak_bytes
from hflow_fast.nn import (
    ActNorm, AffineCoupling, CouplingSpec, FlowStep, Haar, InvConv1x1, Reversible, Sequential, Squeeze,
)  # fmt: skip
from hflow_fast.nn._fusion import ChannelMap, Coupling, Opaque
from hflow_fast.testing import assert_invertible, assert_log_det

CPU = torch.device("cpu")
CHECKERBOARD = CouplingSpec(active="checkerboard", block=2, scale_map="exp_clip", shift_clamp=5.0)
GLOW = CouplingSpec(scale_map="sigmoid", form="add_scale", layout="interleaved", shift_first=True, active="channels")
SHAPE = (2, 4, 4, 4)


class Net(nn.Module):
    """Half of the channels, and a context, to raw parameters; counts its runs."""

    def __init__(self, channels: int, context: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels // 2 + context, 2 * (channels - channels // 2), 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.runs = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            self.runs += 1
        return self.dropout(self.conv(x if context is None else torch.cat([x, context], dim=1)).tanh())


def half(channels: int, spec: CouplingSpec = GLOW, swap: bool = False, **options: float) -> AffineCoupling:
    return AffineCoupling(Net(channels, **options), spec, swap)


def full(channels: int) -> AffineCoupling:
    return AffineCoupling(nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.Tanh()), CHECKERBOARD, True)


def glow(channels: int, steps: int, parametrization: str = "plu", **options: float) -> list[nn.Module]:
    return [layer for _ in range(steps) for layer in
            (ActNorm(channels), InvConv1x1(channels, parametrization), half(channels, **options))]  # fmt: skip


class Foreign(nn.Module):
    """A layer of one's own, with parameters and random numbers, which says nothing about its pieces."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = nn.Parameter(torch.tensor(0.3)), dropout

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self._scale(x, context)
        return x * scale.exp(), scale * x[0].numel()

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self._scale(z, context)
        return z * (-scale).exp(), -scale * z[0].numel()

    def _scale(self, x: Tensor, context: Tensor | None) -> Tensor:
        scale = self.scale if context is None else self.scale * context.mean().sigmoid()
        return nn.functional.dropout(scale, self.dropout)


class Eager(nn.Module):
    """An adapter's layer: a coupling and a map, which do not say whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log_scale = Net(4), nn.Parameter(torch.randn(4) / 4)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return Sequential(self)(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return Sequential(self).inverse(z, context)

    def pieces(self, inverse: bool, context: Tensor | None = None) -> list[ChannelMap | Coupling | Opaque]:
        log_scale = -self.log_scale if inverse else self.log_scale
        scale = log_scale.exp()
        pieces = [Coupling(lambda x: self.net(x[:, :2]), CouplingSpec(active="channels"), inverse),
                  ChannelMap(scale, None, log_scale.sum(), lambda x: _scaled(x, log_scale))]
        return pieces[::-1] if inverse else pieces


def _scaled(x: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return x * log_scale.exp().view(-1, 1, 1), (log_scale.sum() * x[0, 0].numel()).expand(len(x))


@dataclass(frozen=True)
class Chain:
    name: str
    build: Callable[[], list[nn.Module]]
    shape: tuple[int, ...] = SHAPE
    context: bool = False


CHAINS = [
    Chain("glow", lambda: glow(4, 4)),
    Chain("levels", lambda: [*glow(4, 2, "full"), Squeeze(), *glow(16, 2, "orthogonal"), Haar()]),
    Chain("flow-steps", lambda: [ActNorm(4), InvConv1x1(4), *(FlowStep(4, Net(4)) for _ in range(3))]),
    Chain("hflow", lambda: [layer for _ in range(3) for layer in (full(4), InvConv1x1(4), ActNorm(4))]),
    Chain("context", lambda: [*glow(4, 2, context=3), AffineCoupling(nn.Conv2d(3, 8, 1), CouplingSpec()), ActNorm(4)],
          context=True),
    Chain("foreign", lambda: [Foreign(), *glow(4, 1), Foreign(), ActNorm(4), Foreign()]),
    Chain("foreign-context", lambda: [Foreign(), half(4, context=3), Foreign()], context=True),
    Chain("maps", lambda: [InvConv1x1(4), ActNorm(4), Squeeze(), ActNorm(16), Haar(), InvConv1x1(64), ActNorm(64)]),
    Chain("wide", lambda: [*glow(40, 2), ActNorm(40), ActNorm(40)], (2, 40, 2, 2)),
    Chain("nested", lambda: [Sequential(*glow(4, 1), Sequential(*glow(4, 1))), Reversible(glow(4, 2)), ActNorm(4)]),
    Chain("eager", lambda: [Eager(), Eager(), ActNorm(4), Eager()]),
    Chain("vectors", lambda: [ActNorm(6), InvConv1x1(6), AffineCoupling(nn.Linear(3, 6)), ActNorm(6)], (5, 6)),
    Chain("one", lambda: [half(4)]),
    Chain("empty", list),
]
BY_NAME = {case.name: case for case in CHAINS}
every_chain = pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def build(case: Chain, dtype: torch.dtype = torch.float64) -> tuple[Sequential, Tensor, Tensor | None]:
    """A trained chain and its inputs."""
    torch.manual_seed(0)
    chain, x = Sequential(*case.build()).to(dtype), torch.randn(case.shape, dtype=dtype) * 2 + 1
    context = torch.randn(case.shape[0], 3, *case.shape[2:], dtype=dtype) if case.context else None
    with torch.no_grad():
        chain(x, context)
        for parameter in chain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return chain, x, context


def loss_of(y: Tensor, log_det: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return (weights * y).sum() + (log_det * torch.linspace(1, 2, len(log_det), dtype=log_det.dtype)).sum()


def results(layer: nn.Module, x: Tensor, context: Tensor | None = None, inverse: bool = False,
            seed: int = 0) -> list[Tensor | None]:
    """Outputs, and gradients of x, the context and all parameters; for the inverse, at the x of the latent."""
    if inverse:
        with torch.no_grad():
            x = layer(*(tensor for tensor in (x, context) if tensor is not None))[0]
    inputs = [tensor.detach().requires_grad_() for tensor in (x, context) if tensor is not None]
    torch.manual_seed(seed)
    y, log_det = (layer.inverse if inverse else layer)(*inputs)
    outputs = [y.detach(), log_det.detach()]
    gradients = torch.autograd.grad(loss_of(y, log_det), [*inputs, *layer.parameters()], allow_unused=True)
    return [*outputs, *gradients]


def assert_same(got: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        if other is None or one is None:
            assert one is other
        else:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * (1 + other.abs().max().item()))


@both_directions
@every_chain
def test_gradients_are_those_of_stored_activations(case, inverse):
    chain, x, context = build(case)
    expected = results(chain, x, context, inverse)
    for keep_every in (None, 1, 2):
        assert_same(results(Reversible(chain, keep_every), x, context, inverse), expected, 1e-10)


@both_directions
@every_chain
def test_gradients_in_float32_are_within_rounding(case, inverse):
    """No further off float64 than a few times what stored activations are, plus the rounding of the inversion."""
    chain, x, context = build(case, torch.float32)
    exact = results(copy.deepcopy(chain).double(), x.double(), None if context is None else context.double(), inverse)
    stored, rebuilt = (results(layer, x, context, inverse) for layer in (chain, Reversible(chain)))
    assert_same(rebuilt[:2], stored[:2], 1e-6 if case.name == "eager" else 0.0)  # whose map has a way of its own
    for one, other, truth in zip(rebuilt, stored, exact, strict=True):
        if truth is not None:
            error, base = ((value - truth).norm() / (truth.norm() + 1e-3) for value in (one, other))
            assert error <= 4 * base + 3e-6


@every_chain
def test_passes_the_property_tests(case):
    chain, _, context = build(case, torch.float32)
    if case.name in ("glow", "context", "foreign"):
        layer = Reversible(chain)
        assert_invertible(layer, case.shape, context=context, seeds=[0])
        assert_log_det(layer, case.shape, context=context, seeds=[0])


@pytest.mark.parametrize("name", ["glow", "levels", "flow-steps", "hflow"])
def test_networks_run_twice(name):
    chain, x, _ = build(BY_NAME[name])
    networks = [module for module in chain.modules() if isinstance(module, Net)]
    for layer, expected in ((chain, 1), (Reversible(chain), 2), (Reversible(chain, keep_every=1), 2)):
        for network in networks:
            network.runs = 0
        results(layer, x)
        assert all(network.runs == expected for network in networks)


def step_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        loss_of(*layer(x)).backward()

    step()
    return step


def test_memory_does_not_grow_with_depth():
    kept: dict[str, list[int]] = {"stored": [], "rebuilt": []}
    peaks: dict[str, list[int]] = {"stored": [], "rebuilt": []}
    x = torch.randn(4, 8, 32, 32)
    for steps in (4, 16):
        torch.manual_seed(0)
        chain = Sequential(*glow(8, steps))
        for name, layer in (("stored", chain), ("rebuilt", Reversible(chain))):
            step = step_of(layer, x)
            with SavedBytes() as saved:
                outputs = layer(x)
            kept[name].append(saved.total)
            del outputs
            peaks[name].append(peak_bytes(step, CPU))
    size = x.numel() * x.element_size()
    per_step = {name: (deep - shallow) / 12 for name, (shallow, deep) in kept.items()}
    assert per_step["rebuilt"] < 0.02 * size < size < per_step["stored"]
    growth = {name: (deep - shallow) / 12 for name, (shallow, deep) in peaks.items()}
    assert growth["rebuilt"] < 0.1 * size < size < growth["stored"]
    assert kept["rebuilt"][1] < 3 * size


def test_nothing_but_the_ends_outlives_the_forward_pass(monkeypatch):
    """Not even tensors that no saved-tensor hook sees."""
    chain, x, _ = build(BY_NAME["glow"], torch.float32)
    x = x.repeat(8, 1, 8, 8)
    layer, before = Reversible(chain), _large_tensors(x.numel())
    z, log_det = layer(x)
    assert _large_tensors(x.numel()) - before <= 2  # z, and autograd's reference to it


def _large_tensors(elements: int) -> int:
    import gc

    gc.collect()
    return len({tensor.untyped_storage().data_ptr() for tensor in gc.get_objects()
                if type(tensor) is Tensor and tensor.numel() >= elements})


@pytest.mark.parametrize("keep_every", [1, 2, 3])
def test_keeps_what_it_is_told_to(keep_every):
    chain, x, _ = build(Chain("", lambda: [half(4) for _ in range(7)]), torch.float32)
    x = x.repeat(1, 1, 8, 8)
    layer = Reversible(chain, keep_every)
    with SavedBytes() as saved:
        layer(x)
    size = x.numel() * x.element_size()
    kept = len(range(0, 7, keep_every)) + (6 % keep_every != 0)  # inputs, and the last output where it is needed
    assert kept * size <= saved.total <= (kept + 0.2) * size
    results(layer, x)
    assert len(layer.inversion_errors()) == 7 - len(range(0, 7, keep_every))


def test_dropout_is_drawn_again():
    for layers in (lambda: glow(4, 3, dropout=0.5), lambda: [Foreign(0.5), *glow(4, 1), Foreign(0.5)]):
        chain, x, _ = build(Chain("", layers))
        for seed in (1, 2, 3):
            assert_same(results(Reversible(chain), x, seed=seed), results(chain, x, seed=seed), 1e-10)
    chain, x, _ = build(Chain("", lambda: glow(4, 3, dropout=0.5)))
    x.requires_grad_()
    with pytest.warns(RuntimeWarning, match="rebuilt by inversion, is off by"):
        wrong = results(Reversible(chain, preserve_rng_state=False), x)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(wrong, results(chain, x)))


def test_the_backward_pass_leaves_the_random_state():
    chain, x, _ = build(Chain("", lambda: glow(4, 2, dropout=0.5)))
    loss = loss_of(*Reversible(chain)(x))
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_autocast(inside):
    """The second run is like the first, wherever backward is called."""
    chain, x, _ = build(BY_NAME["glow"], torch.float32)
    inputs = [x.requires_grad_(), *chain.parameters()]

    def gradients(layer: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y, log_det = layer(x)
            assert y.dtype == log_det.dtype == torch.float32
            if inside:
                return [y, *torch.autograd.grad(loss_of(y, log_det), inputs)]
        return [y, *torch.autograd.grad(loss_of(y, log_det), inputs)]

    stored, rebuilt = gradients(chain), gradients(Reversible(chain))
    assert torch.equal(stored[0], rebuilt[0])
    for one, other in zip(rebuilt, stored):
        assert (one - other).norm() <= 0.01 * other.norm()
    exact = results(chain, x)[2:]
    assert any((one - other).norm() > 1e-3 * other.norm() for one, other in zip(rebuilt[1:], exact))  # it is bfloat16


def test_autocast_around_backward_only():
    chain, x, _ = build(BY_NAME["glow"], torch.float32)
    gradients = []
    for layer in (chain, Reversible(chain)):
        loss = loss_of(*layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(list(torch.autograd.grad(loss, list(chain.parameters()))))
    assert_same(gradients[1], gradients[0], 1e-4)


def test_weights_cast_in_the_forward_pass_still_learn_elsewhere():
    """Autocast's cache must not keep what was cast with gradients off."""
    chain, x, _ = build(BY_NAME["glow"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        Reversible(chain)(x)
        y, _ = chain(x)
        y.sum().backward()
    assert all(parameter.grad is not None for parameter in chain[2].parameters())


def test_half_precision_input_under_autocast():
    chain, x, _ = build(BY_NAME["levels"], torch.float32)
    x = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for layer in (Reversible(chain), Reversible([Squeeze(), *glow(16, 2)])):
            y, log_det = layer(x)
            (gradient,) = torch.autograd.grad(loss_of(y, log_det), x)
            assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["glow", "context", "wide", "levels"])
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    chain, x, context = build(BY_NAME[name], torch.float32)
    compiled = torch.compile(Reversible(chain), backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, x, context), results(chain, x, context), 1e-4)


def test_first_pass_initialises():
    torch.manual_seed(0)
    stored = Sequential(*glow(4, 2), FlowStep(4, Net(4)), ActNorm(4)).double()
    rebuilt, x = copy.deepcopy(stored), torch.randn(SHAPE, dtype=torch.float64) * 3 + 1
    for _ in range(2):
        assert_same(results(Reversible(rebuilt), x), results(stored, x), 1e-10)
    for name, value in stored.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value), name


@pytest.mark.parametrize("frozen", ["nothing", "first", "middle", "last", "networks", "all"])
@pytest.mark.parametrize("of_data", [False, True])
def test_frozen_parameters(frozen, of_data):
    chain, x, _ = build(BY_NAME["glow"])
    count = {"nothing": [], "first": range(5), "middle": range(3, 8), "last": range(6, 12), "all": range(12),
             "networks": range(2, 12, 3)}[frozen]  # fmt: skip
    for index in count:
        chain[index].requires_grad_(False)
    x.requires_grad_(of_data)
    inputs = [tensor for tensor in (x, *chain.parameters()) if tensor.requires_grad]
    losses = [loss_of(*layer(x)) for layer in (chain, Reversible(chain))]
    assert losses[0].requires_grad is losses[1].requires_grad is bool(inputs)
    if inputs:
        stored, rebuilt = (torch.autograd.grad(loss, inputs) for loss in losses)
        assert_same(list(rebuilt), list(stored), 1e-10)


@pytest.mark.parametrize("which", ["z", "log_det", "one-sample", "one-parameter"])
def test_parts_of_the_gradient(which):
    chain, x, _ = build(BY_NAME["foreign"])
    gradients = []
    for layer in (chain, Reversible(chain)):
        z, log_det = layer(x.requires_grad_())
        loss = {"z": z.sum(), "log_det": log_det.sum(), "one-sample": z[0].sum() + log_det[0],
                "one-parameter": loss_of(z, log_det)}[which]  # fmt: skip
        inputs = [chain[2].lower] if which == "one-parameter" else [x, *chain.parameters()]
        gradients.append(list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)))
    assert_same(gradients[1], gradients[0], 1e-10)


def test_a_kept_graph_gives_the_same_gradients_again():
    chain, x, _ = build(BY_NAME["levels"])
    loss = loss_of(*Reversible(chain)(x.requires_grad_()))
    inputs = [x, *chain.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)


def test_several_passes_at_once():
    """Each has a tape of its own; also through one chain twice in a row, and in both directions."""
    chain, x, _ = build(BY_NAME["glow"])
    layer, gradients = Reversible(chain), []
    for run in (chain, layer):
        z, log_det = run(x.requires_grad_())
        again, more = run(2 * z)
        back, less = run.inverse(again.sin())
        loss = loss_of(z, log_det) + loss_of(again, more) + loss_of(back, less)
        gradients.append(list(torch.autograd.grad(loss, [x, *chain.parameters()])))
    assert_same(gradients[1], gradients[0], 1e-9)


def test_inside_a_sequential():
    chain, x, _ = build(BY_NAME["glow"])
    whole = Sequential(Squeeze(), Haar(), Reversible(Sequential(*chain[:0])), *chain)
    parts = Sequential(Reversible(chain[:6]), Reversible(chain[6:]))
    assert len(whole) == 15
    assert_same(results(parts, x), results(chain, x), 1e-10)


def test_second_derivatives_are_refused():
    chain, x, _ = build(BY_NAME["glow"])
    loss = loss_of(*Reversible(chain)(x.requires_grad_()))
    with pytest.raises(RuntimeError, match="Reversible has no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_a_step_between_forward_and_backward_is_an_error():
    chain, x, _ = build(BY_NAME["glow"])
    layer, conv = Reversible(chain), chain[-1].net.conv

    def replace() -> None:
        old, conv.bias = conv.bias, nn.Parameter(conv.bias.detach().clone())
        while conv.bias._version < old._version:  # nothing but the tensor itself tells
            conv.bias.add_(0)

    for change in (torch.optim.SGD(chain.parameters(), lr=1e-3).step, replace):
        loss = loss_of(*layer(x))
        loss_of(*layer(x)).backward()
        with torch.no_grad():
            change()
        with pytest.raises(RuntimeError, match=r"parameters of layer 11 \(AffineCoupling\) changed between"):
            loss.backward()


@pytest.mark.parametrize("what", ["x", "z", "context"])
def test_changes_in_place_are_errors(what):
    chain, x, context = build(BY_NAME["context"])
    x = x.clone()
    z, log_det = Reversible(chain)(x, context)
    loss = loss_of(z, log_det)
    with torch.no_grad():
        {"x": x, "z": z, "context": context}[what].mul_(2)
    message = "context was changed in place" if what == "context" else "inplace operation"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def ill_conditioned() -> Sequential:
    torch.manual_seed(0)
    chain = Sequential(*glow(4, 4, "full"))
    chain(torch.randn(SHAPE))
    with torch.no_grad():
        left, right = torch.linalg.qr(torch.randn(2, 4, 4))[0]
        chain[7].weight.copy_(left * torch.logspace(0, -7, 4) @ right)
    return chain


def test_reports_inversions_that_cannot_be_trusted():
    chain, x = ill_conditioned(), torch.randn(SHAPE)
    layer = Reversible(chain)
    assert layer.inversion_error() == 0.0 and layer.inversion_errors() == {}
    with pytest.warns(RuntimeWarning, match=r"input of layer \d \(\w+\), rebuilt by inversion, is off by") as caught:
        results(layer, x)
    assert len(caught) == 1
    errors = layer.inversion_errors()
    assert layer.inversion_error() == max(errors.values()) > layer.limit
    named = next(label for label, error in errors.items() if error > layer.limit)
    assert named in str(caught[0].message)
    # What comes behind the matrix is rebuilt well; it is folded into the step of the coupling before it.
    assert errors["layer 8 (AffineCoupling)"] < 1e-4 and named == "layer 5 (AffineCoupling)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(layer, x)  # once
        results(Reversible(chain, keep_every=1), x)
        results(Reversible(chain.double()), x.double())
    chain.float()
    layer.reset_inversion_error()
    assert layer.inversion_error() == 0.0
    with pytest.warns(RuntimeWarning, match="rebuilt by inversion"):
        results(layer, x)


def test_the_error_is_that_of_the_gradients():
    """Gradients of a chain with a small reported error are right, and with a large one wrong."""
    for condition, right in ((1e2, True), (1e7, False)):
        chain, x = ill_conditioned(), torch.randn(SHAPE)
        with torch.no_grad():
            left, right_factor = torch.linalg.qr(torch.randn(2, 4, 4))[0]
            chain[7].weight.copy_(left * torch.tensor([1, 0.1, 0.1, 1 / condition]) @ right_factor)
        layer = Reversible(chain, limit=1e9)
        rebuilt, stored = results(layer, x)[2], results(chain, x)[2]
        error = ((rebuilt - stored).norm() / stored.norm()).item()
        assert (error < 1e-3) is right
        assert (layer.inversion_error() < 1e-3) is right


def test_a_singular_matrix_is_reported():
    chain, x = ill_conditioned(), torch.randn(SHAPE)
    with torch.no_grad():
        chain[7].weight[0] = chain[7].weight[1]
    layer = Reversible(chain)
    with pytest.warns(RuntimeWarning, match="is off by nan"):
        results(layer, x)
    assert layer.inversion_error() != layer.inversion_error()


def test_errors_are_the_worst_of_all_passes():
    chain, x, _ = build(BY_NAME["glow"], torch.float32)
    layer = Reversible(chain)

    def error_of(*passes: tuple[Tensor, bool]) -> float:
        layer.reset_inversion_error()
        for data, inverse in passes:
            results(layer, data, inverse=inverse)
        return layer.inversion_error()

    passes = [(scale * x, inverse) for scale in (0.1, 1.0, 30.0) for inverse in (False, True)]
    alone = [error_of(one) for one in passes]
    assert len(set(alone)) > 4
    assert 0 < min(alone) < max(alone) < 1e-4
    assert error_of(*passes) == error_of(*passes[::-1]) == max(alone)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(duplicate):
    chain, x, _ = build(BY_NAME["glow"])
    layer = Reversible(chain, keep_every=2)
    expected = results(layer, x)
    other = duplicate(layer)
    assert other.keep_every == 2
    assert_same(results(other, x), expected, 0.0)
    assert list(other.state_dict()) == [f"chain.{name}" for name in chain.state_dict()]


def test_distributed_data_parallel(process_group):
    chain, x, _ = build(BY_NAME["glow"])
    expected = results(chain, x)[3:]
    wrapped = DistributedDataParallel(Reversible(chain))
    for _ in range(2):
        chain.zero_grad()
        loss_of(*wrapped(x)).backward()
        assert_same([parameter.grad for parameter in chain.parameters()], expected, 1e-10)


def test_without_gradients_it_is_the_chain():
    chain, x, _ = build(BY_NAME["glow"])
    with torch.no_grad():
        for inverse in (False, True):
            layer, expected = Reversible(chain), chain.inverse(x) if inverse else chain(x)
            assert all(torch.equal(*pair) for pair in zip((layer.inverse if inverse else layer)(x), expected))
    assert Reversible(chain).inversion_error() == 0.0


def test_no_samples():
    chain, x, _ = build(BY_NAME["glow"])
    got = results(Reversible(chain), x[:0])
    assert got[0].shape == (0, 4, 4, 4)
    assert all(not gradient.any() for gradient in got[3:])


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="keep_every must be a positive number of steps or None, got 0"):
        Reversible([ActNorm(3)], keep_every=0)
    with pytest.raises(ValueError, match="limit must be positive, got -1"):
        Reversible([ActNorm(3)], limit=-1)
    with pytest.raises(ValueError, match="layer 1, Conv2d, has no method inverse"):
        Reversible([ActNorm(3), nn.Conv2d(3, 3, 1)])

    class Other(Sequential):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return super().forward(2 * x, context)

    with pytest.raises(ValueError, match="chain is a Other, which does more than run its layers"):
        Reversible(Other(ActNorm(3)))
    layer = Reversible([half(4)])
    layer.chain.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks on the chain itself"):
        layer(torch.randn(SHAPE))

    class Lossy(nn.Module):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return x[:, :2] * 1, x.new_zeros(len(x))

        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return z, z.new_zeros(len(z))

    z, log_det = Reversible([half(4), Lossy()])(torch.randn(SHAPE))
    with pytest.raises(RuntimeError, match=r"the inverse of layer 1 \(Lossy\) gave the shape"):
        z.sum().backward()

    class Mute(ActNorm):
        def pieces(self, inverse: bool, context: Tensor | None = None) -> list[Opaque]:
            return [Opaque(self.forward)]

    with pytest.raises(ValueError, match=r"layer 0 \(Mute\) does not say how to undo"):
        Reversible([Mute(3)])(torch.randn(2, 3))
