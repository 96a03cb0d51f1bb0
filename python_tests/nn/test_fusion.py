"""Chains run fused: what they compute is what their layers compute one by one, in fewer passes."""

from __future__ import annotations

import copy
import io
import pickle
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hflow_fast.nn import ActNorm, AffineCoupling, CouplingSpec, FlowStep, Haar, InvConv1x1, Sequential, Squeeze
from hflow_fast.nn._fusion import ChannelMap, Coupling, Opaque, fold, run
from hflow_fast.ops import actnorm, coupling
from hflow_fast.testing import assert_invertible, assert_log_det

CHECKERBOARD = CouplingSpec(active="checkerboard", block=2, scale_map="exp_clip", shift_clamp=5.0)
GLOW = CouplingSpec(scale_map="sigmoid", form="add_scale", layout="interleaved", shift_first=True, active="channels")


class Net(nn.Module):
    """Half of the channels, and a context, to raw parameters."""

    def __init__(self, channels: int, context: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels // 2 + context, 2 * (channels - channels // 2), 3, padding=1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.conv(x if context is None else torch.cat([x, context], dim=1)).tanh()


def half(channels: int, spec: CouplingSpec = CouplingSpec(active="channels"), swap: bool = False) -> AffineCoupling:
    return AffineCoupling(Net(channels), spec, swap)


def full(channels: int, spec: CouplingSpec = CHECKERBOARD, swap: bool = False) -> AffineCoupling:
    return AffineCoupling(nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.Tanh()), spec, swap)


def glow(channels: int, steps: int, parametrization: str = "plu") -> list[nn.Module]:
    return [layer for _ in range(steps)
            for layer in (ActNorm(channels), InvConv1x1(channels, parametrization), half(channels, GLOW))]


@dataclass(frozen=True)
class Chain:
    name: str
    build: Callable[[], list[nn.Module]]
    shape: tuple[int, ...] = (2, 4, 4, 4)
    context: bool = False
    fused: dict[str, int] | None = None
    """How often each of our kernels runs, from data to latent."""
    inverse: dict[str, int] | None = None


CHAINS = [
    Chain("glow", lambda: [*glow(4, 3), Squeeze(), *glow(16, 2)],
          fused={"conv1x1": 2, "flow_step": 3, "coupling": 2}, inverse={"flow_step": 5}),
    Chain("glow-full", lambda: glow(4, 2, "full"), fused={"conv1x1": 1, "flow_step": 1, "coupling": 1},
          inverse={"flow_step": 2}),
    Chain("glow-orthogonal", lambda: glow(4, 2, "orthogonal"), fused={"conv1x1": 1, "flow_step": 1, "coupling": 1},
          inverse={"flow_step": 2}),
    Chain("nested", lambda: [Sequential(ActNorm(4), InvConv1x1(4)), Sequential(half(4), Sequential(ActNorm(4))),
                             InvConv1x1(4), half(4)],
          fused={"conv1x1": 1, "flow_step": 1, "coupling": 1}, inverse={"flow_step": 2}),
    Chain("flow-steps", lambda: [FlowStep(4, Net(4)), FlowStep(4, Net(4), swap_directions=True), ActNorm(4)],
          fused={"flow_step": 2}, inverse={"conv1x1": 1, "flow_step": 1, "coupling": 1}),
    Chain("hflow", lambda: [full(4, swap=True), ActNorm(4), full(4, swap=True), InvConv1x1(4), ActNorm(4)],
          fused={"flow_step": 2}, inverse={"conv1x1": 1, "flow_step": 1, "coupling": 1}),
    Chain("context", lambda: [AffineCoupling(Net(4, 3)), ActNorm(4), AffineCoupling(Net(4, 3)), InvConv1x1(4),
                              AffineCoupling(nn.Conv2d(3, 8, 1), CouplingSpec())], context=True,
          fused={"flow_step": 2, "coupling": 1}, inverse={"flow_step": 2, "coupling": 1}),
    Chain("maps", lambda: [InvConv1x1(4, "full"), ActNorm(4), InvConv1x1(4, "orthogonal"), InvConv1x1(4), ActNorm(4)],
          fused={"conv1x1": 1}, inverse={"conv1x1": 1}),
    Chain("actnorms", lambda: [ActNorm(4), ActNorm(4), half(4), ActNorm(4), ActNorm(4)],
          fused={"flow_step": 1}, inverse={"flow_step": 1}),
    Chain("alone", lambda: [ActNorm(4), Haar(), InvConv1x1(16), Squeeze(), half(64), Haar(), Sequential(ActNorm(256))],
          (2, 4, 16, 16),
          fused={"actnorm": 2, "conv1x1": 1, "coupling": 1, "haar": 2},
          inverse={"actnorm": 2, "conv1x1": 1, "coupling": 1, "haar": 2}),
    # Beyond 32 channels matrices are products of torch; actnorms without one stay kernels of their own.
    Chain("wide", lambda: [*glow(40, 2), ActNorm(40), half(40, GLOW), ActNorm(40), ActNorm(40), InvConv1x1(40),
                           InvConv1x1(40, "full")], (2, 40, 2, 2),
          fused={"coupling": 3, "actnorm": 1}, inverse={"coupling": 3, "actnorm": 1}),
    Chain("vectors", lambda: [ActNorm(6), InvConv1x1(6), AffineCoupling(nn.Linear(3, 6)), ActNorm(6), InvConv1x1(6)],
          (5, 6), fused={"conv1x1": 1, "flow_step": 1}, inverse={"conv1x1": 1, "flow_step": 1}),
    Chain("empty", list, fused={}, inverse={}),
]  # fmt: skip
every_chain = pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


@torch.no_grad()
def trained(chain: Sequential, x: Tensor, context: Tensor | None = None) -> Sequential:
    """After the first pass and some steps."""
    one_by_one(chain, x, context, False)
    for parameter in chain.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return chain


def build(case: Chain, dtype: torch.dtype = torch.float64) -> tuple[Sequential, Tensor, Tensor | None]:
    torch.manual_seed(0)
    chain, x = Sequential(*case.build()).to(dtype), torch.randn(case.shape, dtype=dtype) * 2 + 1
    context = torch.randn(case.shape[0], 3, *case.shape[2:], dtype=dtype) if case.context else None
    return trained(chain, x, context), x, context


def leaves(module: nn.Module) -> list[nn.Module]:
    """The layers, containers and flow steps taken apart."""
    if isinstance(module, Sequential):
        return [leaf for child in module for leaf in leaves(child)]
    return [module.coupling, module.actnorm, module.invconv] if isinstance(module, FlowStep) else [module]


def one_by_one(chain: nn.Module, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    log_det = x.new_zeros(len(x))
    for layer in leaves(chain)[::-1] if inverse else leaves(chain):
        x, term = layer.inverse(x, context) if inverse else layer(x, context)
        log_det = log_det + term
    return x, log_det


def together(chain: nn.Module, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    return chain.inverse(x, context) if inverse else chain(x, context)


def results(function: Callable[..., tuple[Tensor, Tensor]], chain: nn.Module, x: Tensor, context: Tensor | None,
            inverse: bool) -> list[Tensor | None]:
    """Outputs, and gradients of x, the context and all parameters; for the inverse, at the x of the latent."""
    if inverse:
        x = one_by_one(chain, x, context, False)[0]
    inputs = [tensor.detach().requires_grad_() for tensor in (x, context) if tensor is not None]
    y, log_det = function(chain, inputs[0], inputs[1] if context is not None else None, inverse)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    loss = loss + (log_det * torch.linspace(1, 2, len(y), dtype=y.dtype)).sum()
    return [y, log_det, *torch.autograd.grad(loss, [*inputs, *chain.parameters()], allow_unused=True)]


def assert_same(got: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        if other is None or one is None:
            assert one is other
        else:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * (1 + other.abs().max().item()))


class Kernels(TorchDispatchMode):
    """Counts the operations called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.counts[function._schema.name] += 1
        return function(*arguments, **options or {})

    def ours(self) -> dict[str, int]:
        """Of this package, those for flow variables."""
        names = {name.removeprefix("hflow_fast::").removesuffix("_fwd"): count for name, count in self.counts.items()
                 if name.startswith("hflow_fast::")}
        return {name: count for name, count in names.items() if name not in ("lu", "lu_many")}


@both_directions
@every_chain
def test_computes_what_its_layers_compute(case, inverse):
    chain, x, context = build(case)
    assert_same(results(together, chain, x, context, inverse), results(one_by_one, chain, x, context, inverse), 1e-11)


@both_directions
@every_chain
def test_rounds_no_more_than_its_layers(case, inverse):
    chain, x, context = build(case, torch.float32)
    wide = None if context is None else context.double()
    expected = results(one_by_one, copy.deepcopy(chain).double(), x.double(), wide, inverse)
    plain, fused = (results(function, chain, x, context, inverse) for function in (one_by_one, together))
    for one, other, exact in zip(fused, plain, expected, strict=True):
        if exact is not None:
            scale = exact.abs().max().item() + 1e-3
            assert (one - exact).abs().max() <= 3 * (other - exact).abs().max() + 1e-6 * scale


@every_chain
def test_runs_fused(case):
    chain, x, context = build(case, torch.float32)
    for inverse, expected in ((False, case.fused), (True, case.inverse)):
        start = chain(x, context)[0] if inverse else x
        with Kernels() as kernels:
            together(chain, start, context, inverse)
        assert kernels.ours() == expected, inverse


@every_chain
def test_passes_the_property_tests(case):
    layer, _, context = build(case)
    if case.name == "empty":
        return
    for dtype in (torch.float32, torch.float64):
        assert_invertible(layer, case.shape, context=context, dtype=dtype, seeds=[0])
    if torch.Size(case.shape[1:]).numel() <= 64:
        assert_log_det(layer, case.shape, context=context, seeds=[0])


def test_takes_channels_last():
    chain, x, _ = build(CHAINS[1], torch.float32)
    last = x.contiguous(memory_format=torch.channels_last)
    assert_same(results(together, chain, last, None, False), results(together, chain, x, None, False), 1e-5)
    assert chain(last)[0].is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_first_pass_initialises_as_the_layers_do():
    torch.manual_seed(0)
    fused = Sequential(*glow(4, 3), Sequential(ActNorm(4)), FlowStep(4, Net(4)))
    plain, x = copy.deepcopy(fused), torch.randn(4, 4, 4, 4) * 3 + 1
    z, log_det = fused(x)
    expected = one_by_one(plain, x, None, False)
    for name, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name
    assert all(layer.is_initialized for layer in fused.modules() if isinstance(layer, ActNorm))
    assert_same([z, log_det], list(expected), 1e-6)
    assert_same(list(fused(x)), list(expected), 1e-5)


def test_eval_mode_does_not_initialise():
    chain = Sequential(*glow(4, 2)).eval()
    chain(torch.randn(2, 4, 4, 4))
    assert not any(layer.is_initialized for layer in chain.modules() if isinstance(layer, ActNorm))


class Recording(ActNorm):
    """With a forward of its own."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x, context)
        return 2 * z, log_det + 2.0

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(z / 2, context)


class Doubled(InvConv1x1):
    """With a matrix of its own."""

    def matrix_and_log_det(self) -> tuple[Tensor, Tensor]:
        matrix, log_det = super().matrix_and_log_det()
        return 2 * matrix, log_det + self.channels * 0.6931471805599453


class Hinted(AffineCoupling):
    """With raw parameters of its own."""

    def raw(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return 0.5 * super().raw(x, context)


def test_subclasses_do_what_they_do():
    torch.manual_seed(0)
    chain = Sequential(Recording(4), Doubled(4), Hinted(Net(4)), ActNorm(4), Doubled(4, "full"), InvConv1x1(4)).double()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    trained(chain, x)
    for inverse in (False, True):
        assert_same(results(together, chain, x, None, inverse), results(one_by_one, chain, x, None, inverse), 1e-11)
    chain[3].forward = lambda x, context=None: (x + 1, x.new_zeros(len(x)))
    assert_same(list(chain(x)), list(one_by_one(chain, x, None, False)), 1e-11)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("index", range(4))
def test_hooks_fire(index, register):
    chain, x, _ = build(Chain("", lambda: [*glow(4, 1), Sequential(*glow(4, 1)), ActNorm(4)]), torch.float32)
    calls = []
    getattr(chain[index], register)(lambda *_: calls.append(1))
    z, log_det = chain(x.requires_grad_())
    (z.sum() + log_det.sum()).backward()
    assert calls == [1]


def test_a_hook_may_change_the_output():
    chain, x, _ = build(CHAINS[1])
    chain[0].register_forward_hook(lambda layer, inputs, outputs: (outputs[0] + 1, outputs[1] * 2))
    assert_same(list(chain(x)), list(one_by_one(chain, x, None, False)), 1e-11)


def test_hooks_on_all_modules_fire():
    chain, x, _ = build(CHAINS[1])
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        chain(x)
    finally:
        handle.remove()
    assert set(chain) <= set(seen)


def test_networks_keep_their_hooks():
    chain, x, _ = build(CHAINS[1])
    calls = []
    chain[2].net.register_forward_hook(lambda *_: calls.append(1))
    chain(x)
    assert calls == [1]


class Foreign(nn.Module):
    """Another library's layer: a log-det that is the same for all samples."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return 2 * x, torch.tensor(3.0)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z / 2, torch.tensor(-3.0)


def test_layers_of_others_stand_between():
    chain, x, _ = build(Chain("", lambda: [ActNorm(4), Foreign(), InvConv1x1(4), half(4), Foreign()]))
    for inverse in (False, True):
        got = results(together, chain, x, None, inverse)
        assert got[1].shape == (2,)
        assert_same(got, results(one_by_one, chain, x, None, inverse), 1e-11)


@torch.no_grad()
def test_folded_maps_are_kept_until_something_changes():
    chain, x, _ = build(CHAINS[0], torch.float32)
    z = chain(x)[0]
    chain.inverse(z)

    def check(expect_work: bool) -> None:
        with Kernels() as kernels:
            back, log_det = chain.inverse(z)
            again, forward_log_det = chain(back)
        assert (kernels.counts["hflow_fast::lu_fwd"] > 0) is expect_work
        assert (kernels.counts["aten::exp"] > 0) is expect_work
        torch.testing.assert_close(again, z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(log_det, -forward_log_det, rtol=1e-4, atol=1e-4)
        for one, other in zip(chain.inverse(z), one_by_one(chain, z, None, True)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    check(False)
    chain[0].bias.add_(1)
    check(True)
    check(False)
    chain[4].log_diagonal.mul_(0.9)
    check(True)
    chain.load_state_dict({name: 1.01 * value if value.is_floating_point() else value
                           for name, value in chain.state_dict().items()})
    check(True)
    check(False)
    chain[1].sign.neg_()
    check(True)
    chain[1] = InvConv1x1(4)
    check(True)
    check(False)
    chain.double()
    z = z.double()
    check(True)


@torch.no_grad()
def test_grouping_is_part_of_what_is_kept():
    """The same layers, with another one between them or not."""
    torch.manual_seed(0)
    layers = trained(Sequential(ActNorm(4), InvConv1x1(4), InvConv1x1(4)), torch.randn(8, 4, 4, 4) * 3 + 1)
    x, foreign = torch.randn(2, 4, 4, 4), Foreign()
    chain = Sequential(layers[0], layers[1], foreign, foreign, layers[2])
    for position in (2, 2, 1):
        chain(x)
        if position == 2:
            del chain[2]
        else:
            chain.insert(1, foreign)
        assert_same(list(chain(x)), list(one_by_one(chain, x, None, False)), 1e-5)


def test_nothing_is_kept_with_gradients():
    chain, x, _ = build(CHAINS[0], torch.float32)
    for _ in range(2):
        with Kernels() as kernels:
            chain.inverse(chain(x)[0])
        assert kernels.counts["hflow_fast::lu_fwd"] == 2  # of each number of channels


@pytest.mark.parametrize("parametrization", ["plu", "full"])
def test_folding_takes_as_many_operations_for_any_depth(parametrization):
    def operations(steps: int) -> int:
        chain, x, _ = build(Chain("", lambda: glow(4, steps, parametrization)), torch.float32)
        with Kernels() as kernels:
            chain(x)
        ignored = ("aten::convolution", "aten::tanh", "aten::slice", "aten::detach", "aten::alias")
        return sum(count for name, count in kernels.counts.items()
                   if not name.startswith("hflow_fast::") and name not in ignored)

    # One chain of 16 steps has no more than another, but for the views of its results.
    assert operations(16) <= operations(4) + 3 * 12


@torch.no_grad()
def test_neighbouring_inverses_undo_what_was_applied():
    """One inverse, in float64, of the folded matrix: as near as float64 throughout gets to a rounded z."""
    ratios = []
    for seed in range(12):
        torch.manual_seed(seed)
        chain = Sequential(*(InvConv1x1(6, "full") for _ in range(3)))
        for layer in chain:
            left, right = torch.linalg.qr(torch.randn(2, 6, 6))[0]
            layer.weight.copy_(left * torch.logspace(0, -1.5, 6) @ right)
        x = torch.randn(4, 6, 16, 16)
        z = chain(x)[0]
        folded = fold(fold(*(ChannelMap(layer.weight, None, torch.zeros(())) for layer in chain[:2])),
                      ChannelMap(chain[2].weight, None, torch.zeros(()))).weight
        exact = torch.einsum("oc,bchw->bohw", torch.linalg.inv(folded.double()), z.double()).float()
        plain = one_by_one(chain, one_by_one(chain, x, None, False)[0], None, True)[0]
        ours, best, others = ((back - x).norm().item() for back in (chain.inverse(z)[0], exact, plain))
        ratios.append((ours / best, others / ours))
    over_best, gain = map(statistics.geometric_mean, zip(*ratios))
    assert over_best < 1.5
    assert gain > 1.0


@torch.no_grad()
def test_says_which_matrix_is_singular():
    chain, x, _ = build(Chain("", lambda: glow(4, 3, "full")), torch.float32)
    chain[1].weight[0] = chain[1].weight[1]
    with pytest.warns(RuntimeWarning, match="Sequential: matrix 0 of 3 is numerically singular"):
        chain.inverse(x)


def test_layers_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="hflow_fast.conv1x1: weight must have shape"):
        Sequential(ActNorm(4, data_init=False), InvConv1x1(5))(torch.randn(2, 4, 4, 4))
    with pytest.raises(ValueError, match="hflow_fast.flow_step: weight must have shape"):
        Sequential(half(4), InvConv1x1(5))(torch.randn(2, 4, 4, 4))


@both_directions
def test_training_compiles_to_one_graph(inverse):
    torch._dynamo.reset()
    chain, x, _ = build(Chain("", lambda: [FlowStep(4, Net(4)), InvConv1x1(4, "full"), ActNorm(4)]), torch.float32)
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, chain, x, None, inverse), results(together, chain, x, None, inverse), 1e-4)


@pytest.mark.parametrize("name", ["nested", "context", "wide", "alone"])
@torch.no_grad()
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    (case,) = (case for case in CHAINS if case.name == name)
    chain, x, context = build(case, torch.float32)
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    assert_same(list(compiled(x, context)), list(chain(x, context)), 1e-5)


def test_autocast_rounds_networks_only():
    chain, x, _ = build(CHAINS[7], torch.float32)
    for inverse in (False, True):
        expected = together(chain, x, None, inverse)
        with torch.autocast("cpu", torch.bfloat16):
            got = together(chain, x, None, inverse)
        for one, other in zip(got, expected):
            assert torch.equal(one, other)
    chain, x, _ = build(CHAINS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (z, log_det), plain = chain(x), one_by_one(chain, x, None, False)
        half, _ = chain(x.bfloat16())
    assert z.dtype == log_det.dtype == half.dtype == torch.float32
    torch.testing.assert_close(z, plain[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(z, chain(x)[0], rtol=0.1, atol=0.1)


def test_half_precision():
    for case in (CHAINS[0], CHAINS[4], CHAINS[8]):
        layer, _, _ = build(case, torch.float32)
        assert_invertible(layer, case.shape, dtype=torch.bfloat16, seeds=[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda chain: pickle.loads(pickle.dumps(chain)), copy.copy])
def test_copies_are_chains_of_their_own(duplicate):
    chain, x, _ = build(CHAINS[0], torch.float32)
    with torch.no_grad():
        expected = chain.inverse(chain(x)[0])[0]
        other = duplicate(chain)
        assert torch.equal(other.inverse(other(x)[0])[0], expected)
        if duplicate is not copy.copy:
            for parameter in other.parameters():
                parameter.mul_(1.05)
            assert not torch.equal(other(x)[0], chain(x)[0])
            torch.testing.assert_close(other.inverse(other(x)[0])[0], x, rtol=1e-3, atol=1e-3)
        assert torch.equal(chain.inverse(chain(x)[0])[0], expected)


def test_slices_and_names():
    chain, x, _ = build(CHAINS[1])
    z, log_det = chain[:3](x)
    rest, more = chain[3:](z)
    assert isinstance(chain[:3], Sequential)
    assert_same([rest, log_det + more], list(chain(x)), 1e-11)
    file = io.BytesIO()
    torch.save(chain.state_dict(), file)
    assert not [name for name in chain.state_dict() if "cache" in name]


def test_distributed_data_parallel_sees_all_gradients(process_group):
    chain, x, _ = build(CHAINS[0], torch.float32)
    expected = results(together, chain, x, None, False)[3:]
    z, log_det = DistributedDataParallel(chain)(x)
    loss = (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum() + (log_det * torch.linspace(1, 2, 2)).sum()
    loss.backward()
    assert_same([parameter.grad for parameter in chain.parameters()], expected, 1e-4)


def test_shared_layers():
    torch.manual_seed(0)
    actnorm, invconv, network = ActNorm(4), InvConv1x1(4), half(4)
    chain = Sequential(actnorm, invconv, network, actnorm, invconv, network, invconv, actnorm).double()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    trained(chain, x)
    for inverse in (False, True):
        assert_same(results(together, chain, x, None, inverse), results(one_by_one, chain, x, None, inverse), 1e-11)


def test_parametrized_layers():
    chain, x, _ = build(Chain("", lambda: [ActNorm(4), InvConv1x1(4, "full"), half(4), ActNorm(4)]))
    torch.nn.utils.parametrize.register_parametrization(chain[1], "weight", nn.Sequential(nn.Tanh()))
    with torch.no_grad():
        chain(x)
        chain[1].parametrizations.weight.original.mul_(0.5)
        assert_same(list(chain(x)), list(one_by_one(chain, x, None, False)), 1e-11)
    for inverse in (False, True):
        assert_same(results(together, chain, x, None, inverse), results(one_by_one, chain, x, None, inverse), 1e-11)


@pytest.mark.parametrize("channels", [4, 40])
@pytest.mark.parametrize("diagonal", ["dd", "dm", "md", "mm", "d", "m", "dmd"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("behind_coupling", [True, False])
def test_pieces_of_maps(channels, diagonal, biased, behind_coupling):
    torch.manual_seed(0)
    x, raw = torch.randn(2, channels, 3, 2).double(), torch.randn(2, 2 * channels, 3, 2).double()
    spec, maps, y, expected = CouplingSpec(), [], x, torch.zeros(2, dtype=torch.float64)
    if behind_coupling:
        y, expected = coupling(x, raw, spec, inverse=True)
    for kind in diagonal:
        weight = torch.rand(channels).double() + 0.5 if kind == "d" else torch.randn(channels, channels).double()
        matrix = torch.diag(weight) if kind == "d" else weight
        bias = torch.randn(channels).double() if biased else None
        log_det = torch.linalg.slogdet(matrix).logabsdet
        maps.append(ChannelMap(weight, bias, log_det))
        y, expected = torch.einsum("oc,bchw->bohw", matrix, y), expected + 6 * log_det
        if biased:
            y = y + bias[:, None, None]
    pieces = [Coupling(lambda _: raw, spec, True), *maps] if behind_coupling else maps
    assert_same(list(run(pieces, x)), [y, expected], 1e-11)


def test_a_map_alone_runs_its_own_way():
    log_scale, bias, x = torch.randn(4), torch.randn(4), torch.randn(2, 4, 3, 3)
    scale = log_scale.exp()
    piece = ChannelMap(scale, bias, log_scale.sum(), lambda x: actnorm(x, log_scale, bias))
    with Kernels() as kernels:
        got = run([piece], x)
    assert kernels.ours() == {"actnorm": 1}
    assert_same(list(got), list(actnorm(x, log_scale, bias)), 1e-6)
    with Kernels() as kernels:
        got = run([piece, piece], x)
    assert "actnorm" not in kernels.ours()
    assert_same(list(got), [x * (scale * scale)[:, None, None] + (scale * bias + bias)[:, None, None],
                            (18 * log_scale.sum()).expand(2)], 1e-5)


def test_the_order_is_that_of_the_pieces():
    x = torch.randn(2, 2)
    double = ChannelMap(torch.full((2,), 2.0), torch.ones(2), torch.tensor(1.0))
    square = Opaque(lambda x: (x.square(), torch.full((2,), 0.5)))
    y, log_det = run(iter([double, square, double]), x)
    torch.testing.assert_close(y, 2 * (2 * x + 1).square() + 1)
    torch.testing.assert_close(log_det, torch.full((2,), 2.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_in_float64_are_rounded_once(dtype):
    x = torch.randn(2, 3, 4, 4).to(dtype)
    weight = torch.randn(3, 3, dtype=torch.float64)
    y, log_det = run([ChannelMap(weight, None, torch.tensor(1.0, dtype=torch.float64))] * 2, x)
    assert y.dtype == dtype and log_det.dtype == torch.float64
    expected = torch.einsum("oc,bchw->bohw", weight @ weight, x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_no_pieces():
    x = torch.randn(3, 2)
    y, log_det = run([], x)
    assert y is x and torch.equal(log_det, torch.zeros(3))
