"""Every FrEIA layer and option that runs fused, against the stock one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

modules = pytest.importorskip("FrEIA.modules")

from hflow_fast import accelerate
from hflow_fast.adapters import freia, restore
from hflow_fast.nn import _fusion

from .conftest import accelerated, assert_same

VECTOR, IMAGE, ODD, WIDE = (6,), (4, 4, 4), (5, 4, 2), (70, 2, 1)


def network(channels_in: int, channels_out: int) -> nn.Module:
    """For vectors, sequences, images and volumes."""
    return nn.Sequential(Pointwise(channels_in, 7), nn.Tanh(), Pointwise(7, channels_out))


class Pointwise(nn.Module):
    """A linear map of the channels, and of their mean over the pixels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.own, self.mean = (nn.Linear(channels_in, channels_out) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).mT if x.dim() > 2 else x[:, None]
        y = self.own(pixels) + self.mean(pixels.mean(dim=1, keepdim=True))
        return y.mT.reshape(x.shape[0], -1, *x.shape[2:])


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    conditions: tuple[int, ...] = ()
    """Channels of each."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        kind = getattr(modules, self.kind)
        dims_c = [(channels, *self.shape[1:]) for channels in self.conditions]
        return trained(kind([self.shape], **({"dims_c": dims_c} if dims_c else {}), **self.options), 1.0)

    def inputs(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """What goes in, then the conditions."""
        generator = torch.Generator().manual_seed(5)
        shapes = [self.shape, *((channels, *self.shape[1:]) for channels in self.conditions)]
        return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def trained(module: nn.Module, networks: float) -> nn.Module:
    """``module`` itself, as if it had been trained: initialised, all it learns moved, its networks by so much."""
    for layer in module.modules():
        if isinstance(layer, modules.ActNorm):
            layer._initialize_with_data(2 * torch.randn(50, *layer.dims_in) + 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                size = networks if ".own." in name or ".mean." in name else 0.2
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return module


def coupling(name: str, kind: str, shape: tuple[int, ...] = IMAGE, conditions: tuple[int, ...] = (),
             **options: Any) -> Case:
    return Case(f"{kind} {name}", kind, shape, {"subnet_constructor": network, **options}, conditions)


def matrix(channels: int) -> Tensor:
    """Well-conditioned, and like no other matrix."""
    noise = torch.randn(channels, channels, generator=torch.Generator().manual_seed(2))
    return torch.eye(channels) + noise / (2 * channels**0.5)


ALL_IN_ONE = [
    coupling("image", "AllInOneBlock"),
    coupling("vector", "AllInOneBlock", VECTOR),
    coupling("sequence", "AllInOneBlock", (4, 6)),
    coupling("volume", "AllInOneBlock", (4, 2, 2, 2)),
    coupling("odd", "AllInOneBlock", ODD, affine_clamping=1.3),
    coupling("sigmoid", "AllInOneBlock", global_affine_type="SIGMOID", global_affine_init=0.7),
    coupling("exp", "AllInOneBlock", global_affine_type="EXP"),
    coupling("soft", "AllInOneBlock", ODD, permute_soft=True),
    coupling("householder", "AllInOneBlock", ODD, learned_householder_permutation=3),
    coupling("reverse", "AllInOneBlock", reverse_permutation=True),
    coupling("reverse soft householder", "AllInOneBlock", ODD, reverse_permutation=True, permute_soft=True,
             learned_householder_permutation=2),
    coupling("gin", "AllInOneBlock", gin_block=True, permute_soft=True),
    coupling("gin reverse", "AllInOneBlock", ODD, gin_block=True, reverse_permutation=True),
    coupling("conditional", "AllInOneBlock", conditions=(3, 2)),
    coupling("rather wide", "AllInOneBlock", (36, 2, 2), permute_soft=True, reverse_permutation=True),
    coupling("wide", "AllInOneBlock", WIDE),
    coupling("wide vector", "AllInOneBlock", WIDE[:1], reverse_permutation=True),
    coupling("wide soft", "AllInOneBlock", WIDE, permute_soft=True, reverse_permutation=True),
    coupling("wide gin", "AllInOneBlock", WIDE, gin_block=True),
    coupling("wide householder", "AllInOneBlock", WIDE, learned_householder_permutation=2),
]
TWO_SIDED = [
    coupling(name, kind, shape, conditions, **options)
    for kind in ("GLOWCouplingBlock", "RNVPCouplingBlock", "GINCouplingBlock")
    for name, shape, conditions, options in [
        ("atan", IMAGE, (), {"clamp": 1.7}),
        ("tanh", ODD, (), {"clamp_activation": "TANH", "clamp": 1.5}),
        ("sigmoid", VECTOR, (), {"clamp_activation": "SIGMOID"}),
        ("conditional", VECTOR, (2, 1), {}),
        ("third", VECTOR, (), {"split_len": 0.33, "clamp_activation": "TANH"}),
        ("wide", WIDE, (), {}),
    ]
]
CASES = [
    *ALL_IN_ONE,
    *TWO_SIDED,
    coupling("image", "NICECouplingBlock"),
    coupling("conditional", "NICECouplingBlock", ODD, conditions=(2,)),
    coupling("third", "NICECouplingBlock", VECTOR, split_len=2),
    coupling("own clamp", "GINCouplingBlock", clamp_activation=torch.sin),
    coupling("atan", "AffineCouplingOneSided", ODD),
    coupling("tanh", "AffineCouplingOneSided", VECTOR, clamp_activation="TANH"),
    coupling("tanh by itself", "AffineCouplingOneSided", VECTOR, clamp_activation=torch.tanh, clamp=1.0),
    coupling("sigmoid", "AffineCouplingOneSided", clamp_activation="SIGMOID", clamp=1.2),
    coupling("quarter", "AffineCouplingOneSided", split_len=1, conditions=(2,)),
    coupling("volume", "AffineCouplingOneSided", (3, 2, 2, 2)),
    coupling("one", "ConditionalAffineTransform", conditions=(3,)),
    coupling("two", "ConditionalAffineTransform", VECTOR, conditions=(3, 2), clamp_activation="TANH"),
    Case("ActNorm image", "ActNorm", ODD),
    Case("ActNorm vector", "ActNorm", VECTOR),
    Case("ActNorm wide", "ActNorm", WIDE),
    Case("Fixed1x1Conv", "Fixed1x1Conv", IMAGE, {"M": matrix(4)}),
    Case("Fixed1x1Conv wide", "Fixed1x1Conv", WIDE, {"M": matrix(70)}),
    Case("FixedLinearTransform", "FixedLinearTransform", VECTOR, {"M": matrix(6)}),
    Case("FixedLinearTransform shifted", "FixedLinearTransform", VECTOR, {"M": matrix(6), "b": torch.arange(6.0)}),
    Case("PermuteRandom", "PermuteRandom", IMAGE, {"seed": 3}),
    Case("PermuteRandom wide", "PermuteRandom", WIDE[:1], {"seed": 3}),
    *(Case(f"{kind} {options}", kind, shape, options)
      for kind, shape in [("HaarDownsampling", (3, 4, 6)), ("HaarUpsampling", (12, 2, 3))]
      for options in [{}, {"rebalance": 0.5}, {"order_by_wavelet": True, "rebalance": 1.5}]),
    *(Case(f"{kind} legacy={legacy}", kind, shape, {"legacy_backend": legacy})
      for kind, shape in [("IRevNetDownsampling", (3, 4, 6)), ("IRevNetUpsampling", (12, 2, 3))]
      for legacy in (False, True)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def evaluated(rev: bool = False, jac: bool = True) -> Callable[..., tuple[Any, Tensor]]:
    """A call of a layer: outputs and log-det, as tensors that keep what they were."""

    def call(module: nn.Module, x: Tensor, *conditions: Tensor) -> tuple[Any, Tensor]:
        # The stock Haar transform overwrites what it is given.
        outputs, log_det = module([x.clone()], **({"c": list(conditions)} if conditions else {}), rev=rev, jac=jac)
        if getattr(module, "householder", 0):
            module.w_perm = module.w_perm_inv = None  # the stock block keeps a graph there, which cannot be copied
        return outputs, 1 + torch.as_tensor(log_det)  # some are nothing but what rounding left of a zero

    return call


def reversed_inputs(case: Case, module: nn.Module, batch: int = 3) -> list[Tensor]:
    """Latents, then the conditions."""
    with torch.no_grad():
        inputs = case.inputs(batch)
        return [evaluated()(copy.deepcopy(module), *inputs)[0][0], *inputs[1:]]


@every_case
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "rev"])
def test_is_the_stock_layer(case, rev):
    stock = case.build()
    fast, report = accelerated(stock)
    assert [layer.name for layer in report.replaced] == [""], str(report)
    for batch in (3, 1):
        inputs = reversed_inputs(case, stock, batch) if rev else case.inputs(batch)
        assert_same(stock, fast, *inputs, call=evaluated(rev), rtol=1e-5)
    assert_same(stock.double(), fast.double(), *(value.double() for value in inputs), call=evaluated(rev), rtol=1e-12)


@every_case
def test_without_gradients_and_log_det(case):
    """Again, and after the parameters changed in a way that leaves no trace in their versions."""
    stock = case.build()
    fast, _ = accelerated(stock)
    inputs = case.inputs()
    for rev in (False, True):
        given = reversed_inputs(case, stock) if rev else inputs
        for round in range(3):
            with torch.no_grad():
                for module in (stock, fast):
                    for name, parameter in module.named_parameters():
                        if round == 2 and parameter.requires_grad:
                            parameter.data *= 0.9
                expected, got = (evaluated(rev, jac=round != 1)(module, *given) for module in (stock, fast))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@every_case
def test_types_are_the_stock_ones(case):
    stock = case.build()
    fast, _ = accelerated(stock)
    x, *conditions = case.inputs()
    for given in ((x,), [x]):
        results = [module(given, **({"c": conditions} if conditions else {})) for module in (stock, fast)]
        (expected, log_det), (got, log_det_got) = results
        assert type(got) is type(expected) and len(got) == 1
        assert isinstance(log_det_got, Tensor) == isinstance(log_det, Tensor)
        assert isinstance(log_det_got, float) == isinstance(log_det, float)


@every_case
def test_described_to_a_container(case):
    """The pieces of both directions give what the layer gives by itself, and undo one another."""
    fast, _ = accelerated(case.build())
    fast.double()
    x, *conditions = case.inputs(dtype=torch.float64)
    y, log_det = _fusion.run(fast.pieces(False, conditions, x), x)
    expected, log_det_expected = evaluated()(fast, x, *conditions)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(log_det + 1, log_det_expected.to(x).expand(3))
    x_again, log_det_back = _fusion.run(fast.pieces(True, conditions, x), y)
    torch.testing.assert_close(x_again, x, rtol=1e-5, atol=1e-5)  # matrices are inverted in float32 by FrEIA
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-6, atol=1e-6)


@every_case
def test_state_and_copies(case):
    stock = case.build()
    fast, _ = accelerated(stock)
    assert list(fast.state_dict()) == list(stock.state_dict())
    fast.load_state_dict(stock.state_dict())
    inputs = case.inputs()
    given = reversed_inputs(case, stock)
    with torch.inference_mode():  # what is remembered from here has to serve in training
        evaluated()(fast, *inputs)
        evaluated(rev=True)(fast, *given)
    expected = evaluated()(fast, *inputs)
    if expected[0][0].requires_grad:
        expected[0][0].sum().backward()
    copied = copy.deepcopy(fast)
    assert type(copied) is type(fast)
    again = evaluated()(copied, *inputs)
    torch.testing.assert_close(again, expected)
    if again[0][0].requires_grad:
        again[0][0].sum().backward()
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter += 0.5
    torch.testing.assert_close(evaluated()(fast, *inputs), expected)
    stock.load_state_dict(fast.state_dict())
    torch.testing.assert_close(evaluated()(stock, *inputs), expected, rtol=1e-4, atol=1e-5)
    attributes = set(vars(stock))
    assert restore(fast) == [""] and type(fast) is type(stock)
    assert set(vars(fast)) == attributes


@pytest.mark.parametrize("kind", ["HaarDownsampling", "PermuteRandom", "ActNorm"])
def test_survives_pickling(kind):
    """FrEIA's couplings do not, for the functions they hold."""
    case = next(case for case in CASES if case.kind == kind)
    fast, _ = accelerated(case.build())
    inputs = case.inputs()
    expected = evaluated()(fast, *inputs)
    if kind == "ActNorm":
        fast._load_state_dict_pre_hooks.clear()  # a function in the constructor, too
    torch.testing.assert_close(evaluated()(pickle.loads(pickle.dumps(fast)), *inputs), expected)


def test_a_reversed_haar_transform_leaves_its_input():
    fast, _ = accelerated(modules.HaarDownsampling([(2, 4, 4)], rebalance=0.5))
    z = torch.randn(1, 8, 2, 2)
    kept = z.clone()
    fast([z], rev=True)
    assert torch.equal(z, kept)


def test_actnorm_told_to_initialise_again():
    fast, _ = accelerated(next(case for case in CASES if case.kind == "ActNorm").build())
    fast.init_on_next_batch = True
    x = 5 * torch.randn(20, *ODD) - 3
    (z,), _ = fast([x])
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    assert not fast.init_on_next_batch


def test_reflections_leave_no_graph_behind():
    """With which FrEIA's block cannot be copied any more, once it was called."""
    block = next(case for case in ALL_IN_ONE if case.name.endswith(" householder")).build()
    x = torch.randn(2, *ODD)
    expected = block([x])
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(block)
    accelerate(block)
    torch.testing.assert_close(block([x]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(block)([x]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "build", "reason"), [
    ("ActNorm", lambda: modules.ActNorm([IMAGE]), "not initialised yet"),
    ("clamp", lambda: modules.GLOWCouplingBlock([IMAGE], subnet_constructor=network, clamp_activation=torch.sin),
     "clamp_activation of its own"),
    ("no clamp", lambda: modules.RNVPCouplingBlock([IMAGE], subnet_constructor=network, clamp=0.0), "has clamp 0"),
    ("affine", lambda: modules.AllInOneBlock([IMAGE], subnet_constructor=network, affine_clamping=-1.0),
     "has affine_clamping -1"),
    ("rebalance", lambda: modules.HaarDownsampling([IMAGE], rebalance=-1.0), "rebalance -1"),
    ("unknown", lambda: modules.OrthogonalTransform([VECTOR]), "no fused layer"),
    ("subclass", lambda: type("Mine", (modules.ActNorm,), {})([IMAGE]), "subclass of FrEIA.ActNorm"),
], ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_stays_with_a_reason(name, build, reason):
    module = build()
    kind = type(module)
    report = accelerate(module)
    assert not report.replaced and type(module) is kind
    assert any(reason in layer.reason for layer in report.left), str(report)


@pytest.mark.parametrize("kind", ["Split", "Flatten"])
def test_what_has_nothing_to_fuse_is_not_mentioned(kind):
    assert freia.match(getattr(modules, kind)([IMAGE])) is None
    assert freia.match(nn.Linear(2, 2)) is None


def test_autocast_keeps_the_flow_in_float32():
    """bfloat16 rounds what networks compute, and neither matrices nor the flow variable."""
    stock = coupling("soft", "AllInOneBlock", permute_soft=True, learned_householder_permutation=2).build()
    for layer in (stock.subnet[2].own, stock.subnet[2].mean):
        nn.init.zeros_(layer.weight)
        nn.init.ones_(layer.bias)
    fast, _ = accelerated(stock)
    x = torch.randn(2, *IMAGE)
    (expected,), log_det = stock([x])
    with torch.autocast("cpu", torch.bfloat16):
        (got,), log_det_got = fast([x])
    assert got.dtype == log_det_got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det_got, log_det, rtol=1e-5, atol=1e-5)
