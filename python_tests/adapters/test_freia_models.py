"""Whole models built with FrEIA's containers, before and after acceleration."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

modules = pytest.importorskip("FrEIA.modules")
framework = pytest.importorskip("FrEIA.framework")

from hflow_fast import accelerate
from hflow_fast.nn import _fusion

from .conftest import accelerated, assert_same
from .test_freia_layers import matrix, network, trained


def sequence(*shape: int, kind: str = "SequenceINN", **options: Any) -> nn.Module:
    return getattr(framework, kind)(*shape, **options)


def append(model: nn.Module, kind: str, **options: Any) -> None:
    if "Block" in kind or "Affine" in kind:
        options["subnet_constructor"] = network
    model.append(getattr(modules, kind), **options)


def vectors() -> nn.Module:
    """Couplings that transform both halves, between permutations: FrEIA's tutorial."""
    model = sequence(6)
    for seed in range(3):
        append(model, "GLOWCouplingBlock", clamp_activation=("ATAN", "TANH", "SIGMOID")[seed])
        append(model, "PermuteRandom", seed=seed)
    append(model, "FixedLinearTransform", M=matrix(6), b=torch.arange(6.0) / 10)
    append(model, "RNVPCouplingBlock")
    append(model, "ActNorm")
    append(model, "NICECouplingBlock")
    append(model, "GINCouplingBlock")
    return model


def images() -> nn.Module:
    model = sequence(1, 8, 4)
    append(model, "HaarDownsampling", rebalance=0.5)
    for kind in ("SOFTPLUS", "SOFTPLUS", "SIGMOID", "EXP"):
        append(model, "AllInOneBlock", global_affine_type=kind, permute_soft=True)
    append(model, "Fixed1x1Conv", M=matrix(4))
    append(model, "AffineCouplingOneSided")
    append(model, "ActNorm")
    append(model, "IRevNetDownsampling")
    append(model, "AllInOneBlock", reverse_permutation=True)
    append(model, "AllInOneBlock", reverse_permutation=True)
    append(model, "HaarUpsampling", order_by_wavelet=True)
    append(model, "AllInOneBlock", learned_householder_permutation=2)
    append(model, "AllInOneBlock", learned_householder_permutation=2)
    append(model, "AllInOneBlock", gin_block=True)
    return model


def with_unknown_layers() -> nn.Module:
    """Layers that stay, first, in between and last."""
    model = sequence(6, force_tuple_output=True)
    append(model, "LearnedElementwiseScaling", init_scale=2.0)
    append(model, "GLOWCouplingBlock")
    append(model, "HouseholderPerm", n_reflections=2)
    append(model, "AllInOneBlock")
    append(model, "AllInOneBlock")
    append(model, "HouseholderPerm", n_reflections=3)
    return model


def wide() -> nn.Module:
    """More channels than the fused kernel takes."""
    model = sequence(70, 2, 1)
    append(model, "ActNorm")
    for seed in range(2):
        append(model, "AllInOneBlock")
        append(model, "PermuteRandom", seed=seed)
        append(model, "GLOWCouplingBlock")
    return model


def older() -> nn.Module:
    with pytest.warns(DeprecationWarning):
        model = sequence(6, kind="ReversibleSequential")
    append(model, "AllInOneBlock")
    append(model, "AllInOneBlock")
    return model


def conditional() -> nn.Module:
    model = sequence(4, 2, 2)
    append(model, "AllInOneBlock", cond=1, cond_shape=(3, 2, 2))
    append(model, "AllInOneBlock")
    append(model, "AllInOneBlock", cond=0, cond_shape=(2, 2, 2))
    append(model, "GLOWCouplingBlock", cond=1, cond_shape=(3, 2, 2))
    append(model, "ConditionalAffineTransform", cond=0, cond_shape=(2, 2, 2))
    return model


def block(inputs: Any, kind: str, conditions: Any = None, **options: Any) -> Any:
    if "Block" in kind or "Affine" in kind:
        options["subnet_constructor"] = network
    return framework.Node(inputs, getattr(modules, kind), options, conditions=conditions)


def graph(nodes: list[Any], kind: str = "GraphINN", **options: Any) -> nn.Module:
    return getattr(framework, kind)(nodes, **options)


def glow(**options: Any) -> nn.Module:
    """Two levels; half of the first one's channels leave, and join again at the end."""
    nodes = [framework.InputNode(2, 8, 8)]
    nodes.append(block(nodes[-1], "IRevNetDownsampling"))
    for _ in range(3):
        nodes.append(block(nodes[-1], "AllInOneBlock"))
    split = block(nodes[-1], "Split")
    early = block(split.out0, "Flatten")
    nodes += [split, early, block(split.out1, "HaarDownsampling")]
    for _ in range(2):
        nodes.append(block(nodes[-1], "AllInOneBlock", permute_soft=True))
    nodes.append(block(nodes[-1], "Flatten"))
    nodes.append(block([early.out0, nodes[-1].out0], "Concat"))
    nodes.append(framework.OutputNode(nodes[-1]))
    return graph(nodes, **options)


def two_ended_glow() -> nn.Module:
    """Two outputs, and a condition for one level."""
    start, condition = framework.InputNode(4, 4, 4), framework.ConditionNode(3, 4, 4)
    first = block(start, "AllInOneBlock", condition)
    second = block(first, "GLOWCouplingBlock", [condition])
    third = block(second, "ActNorm")
    split = block(third, "Split", section_sizes=[1, 3])
    fourth = block(split.out1, "AllInOneBlock")
    return graph([start, condition, first, second, third, split, fourth, framework.OutputNode(fourth),
                  framework.OutputNode(split.out0)])


def older_graph() -> nn.Module:
    start = framework.InputNode(6)
    first = block(start, "AllInOneBlock")
    second = block(first, "InvAutoAct")
    third = block(second, "GLOWCouplingBlock")
    with pytest.warns(DeprecationWarning):
        return graph([start, first, second, third, framework.OutputNode(third)], "ReversibleGraphNet", verbose=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    # name: model, shapes of its inputs, shapes of its conditions
    "vectors": (vectors, [(6,)], []),
    "images": (images, [(1, 8, 4)], []),
    "unknown layers": (with_unknown_layers, [(6,)], []),
    "wide": (wide, [(70, 2, 1)], []),
    "older sequence": (older, [(6,)], []),
    "conditional": (conditional, [(4, 2, 2)], [(2, 2, 2), (3, 2, 2)]),
    "glow": (glow, [(2, 8, 8)], []),
    "glow in a tuple": (lambda: glow(force_tuple_output=True), [(2, 8, 8)], []),
    "two-ended glow": (two_ended_glow, [(4, 4, 4)], [(3, 4, 4)]),
    "older graph": (older_graph, [(6,)], []),
}
every_model = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:.*(backward hook|now returns):DeprecationWarning")


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return trained(MODELS[name][0](), 0.1)


def inputs_of(name: str, batch: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(7)
    _, inputs, conditions = MODELS[name]
    return [torch.randn(batch, *shape) for shape in inputs], [torch.randn(batch, *shape) for shape in conditions]


def call(rev: bool = False, jac: bool = True) -> Callable[..., Any]:
    def evaluate(model: nn.Module, inputs: list[Tensor], conditions: list[Tensor]) -> Any:
        x_or_z = inputs[0] if len(inputs) == 1 else tuple(inputs)
        outputs, log_det = model(x_or_z, c=conditions or None, rev=rev, jac=jac)
        for layer in model.modules():
            if getattr(layer, "householder", 0):
                layer.w_perm = layer.w_perm_inv = None  # a graph, which cannot be copied
        return outputs, log_det

    return evaluate


def latents(model: nn.Module, inputs: list[Tensor], conditions: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        z = call()(model, inputs, conditions)[0]
    return [z] if isinstance(z, Tensor) else list(z)


@every_model
@pytest.mark.parametrize("rev", [False, True], ids=["training", "sampling"])
def test_is_the_stock_model(name, rev):
    stock = build(name)
    fast, report = accelerated(stock)
    assert any(layer.name == "" for layer in report.replaced), str(report)
    for batch in (3, 1):
        inputs, conditions = inputs_of(name, batch)
        given = latents(stock, inputs, conditions) if rev else inputs
        # Which of the two is nearer to float64 is chance, where rounding is amplified on the way back.
        assert_same(stock, fast, given, conditions, call=call(rev), rtol=5e-5 if rev else 1e-5)
    given, conditions = ([value.double() for value in values] for values in (given, conditions))
    assert_same(stock.double(), fast.double(), given, conditions, call=call(rev), rtol=1e-11)


@every_model
def test_without_gradients_and_log_det(name):
    stock = build(name)
    fast, _ = accelerated(stock)
    inputs, conditions = inputs_of(name)
    for round in range(3):
        with torch.no_grad():
            given = inputs
            for rev in (False, True):
                for module in (stock, fast):
                    for parameter in module.parameters():
                        if round == 2 and parameter.requires_grad:
                            parameter.data *= 0.97
                jac = round != 1 or name == "unknown layers"  # of which some return None otherwise
                expected, got = (call(rev, jac)(model, given, conditions) for model in (stock, fast))
                torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
                given = [expected[0]] if isinstance(expected[0], Tensor) else list(expected[0])


@every_model
def test_trains_as_the_stock_model_does(name):
    """Three steps of an optimizer that was made before, and the state back into a stock model."""
    stock = build(name).double()
    fast = copy.deepcopy(stock)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (stock, fast)]
    accelerate(fast)
    inputs, conditions = ([value.double() for value in values] for values in inputs_of(name))
    for _ in range(3):
        for model, optimizer in zip((stock, fast), optimizers):
            outputs, log_det = call()(model, inputs, conditions)
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            loss = sum(output.square().sum() for output in outputs) / 2 - log_det.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert list(fast.state_dict()) == list(stock.state_dict())
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    again = build(name, seed=1).double()
    again.load_state_dict(fast.state_dict())
    expected, got = (call()(model, inputs, conditions) for model in (fast, again))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@every_model
def test_copies_are_independent(name):
    fast, _ = accelerated(build(name))
    inputs, conditions = inputs_of(name)
    with torch.no_grad():
        expected = call()(fast, inputs, conditions)
        copied = copy.deepcopy(fast)
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        torch.testing.assert_close(call()(fast, inputs, conditions), expected, rtol=0, atol=0)
        copied.load_state_dict(fast.state_dict())
        torch.testing.assert_close(call()(copied, inputs, conditions), expected, rtol=0, atol=0)


@pytest.fixture
def passes(monkeypatch):
    """How often each kernel runs in a chain."""
    counts: Counter[str] = Counter()
    for name in ("flow_step", "conv1x1", "coupling"):
        def counting(*args: Any, _kernel: Any = getattr(_fusion, name), _name: str = name, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _kernel(*args, **kwargs)
        monkeypatch.setattr(_fusion, name, counting)
    return counts


def test_neighbours_are_fused(passes):
    """A block is one flow step; of a coupling of both halves, two; nothing runs beside them."""
    fast, _ = accelerated(build("images"))
    inputs, _ = inputs_of("images")
    z, _ = fast(inputs[0])
    assert passes == {"flow_step": 10, "conv1x1": 1}  # one permutes first, behind a reshape
    passes.clear()
    fast(z, rev=True)
    assert passes == {"flow_step": 8, "coupling": 2, "conv1x1": 2}  # couplings before a reshape, maps behind one
    passes.clear()
    fast, _ = accelerated(build("vectors"))
    fast(inputs_of("vectors")[0][0])
    assert passes == {"conv1x1": 1, "flow_step": 11, "coupling": 1}


def test_layers_with_hooks_are_called():
    """Whether they were there before, or come later."""
    stock = build("glow")
    blocks = [layer for layer in stock.modules() if isinstance(layer, modules.AllInOneBlock)]
    heard = []
    blocks[0].register_forward_hook(lambda *args: heard.append("early"))
    report = accelerate(stock)
    assert [layer.name for layer in report.left if layer.kind == "FrEIA.AllInOneBlock"] == ["module_list.1"]
    blocks[1].register_forward_pre_hook(lambda *args: heard.append("late"))
    stock(*inputs_of("glow")[0])
    assert heard == ["early", "late"]


def test_blocks_with_a_network_in_common():
    """Tied weights inside networks, which are called as they are, are no obstacle."""
    shared = network(3, 6)
    stock = sequence(6)
    for _ in range(3):
        stock.append(modules.AllInOneBlock, subnet_constructor=lambda *channels: shared)
    fast, report = accelerated(stock)
    assert len(report.replaced) == 4, str(report)
    assert_same(stock, fast, torch.randn(3, 6))


def test_an_activation_of_the_users_own():
    """It may look at more than one element, so that blocks with it are not taken together."""
    stock = build("older sequence")
    for layer in stock:
        layer.global_scale_activation = lambda scale: torch.softmax(scale, dim=1) * 6
        layer.global_scale.data.normal_()
    fast, _ = accelerated(stock)
    fast[0].global_scale_activation = stock[0].global_scale_activation = lambda scale: scale.sum() * 0 + scale.exp()
    assert_same(stock, fast, torch.randn(3, 6))


def test_intermediate_outputs():
    stock = build("glow")
    fast, _ = accelerated(stock)
    inputs, _ = inputs_of("glow")
    expected, got = (model(inputs[0], intermediate_outputs=True) for model in (stock, fast))
    for values, values_got in zip(expected, got):
        assert len(values) == len(values_got)
        for one, other in zip(values.values(), values_got.values()):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_containers_with_nothing_to_fuse_stay():
    model = sequence(6)
    append(model, "InvAutoAct")
    assert _reasons(model) == {"": "none of its layers runs fused", "module_list.0": "there is no fused layer for it"}


def test_a_sequence_whose_log_dets_are_numbers_gives_a_number():
    model = sequence(4, 4, 4)
    append(model, "HaarDownsampling")
    append(model, "PermuteRandom", seed=0)
    stock, _ = copy.deepcopy(model), accelerate(model)
    x = torch.randn(2, 4, 4, 4)
    (expected, log_det), (got, log_det_got) = stock(x), model(x)
    torch.testing.assert_close(got, expected)
    assert isinstance(log_det, float) and log_det_got == log_det


def test_an_output_for_two_nodes_or_a_layer_as_condition_keeps_the_graph():
    start = framework.InputNode(6)
    first = block(start, "AllInOneBlock")
    second, third = block(first, "AllInOneBlock"), block(first, "InvAutoAct")
    forked = graph([start, first, second, third, framework.OutputNode(second), framework.OutputNode(third)])
    assert _reasons(forked)[""] == "an output goes to two nodes"
    start = framework.InputNode(6)
    first = block(start, "AllInOneBlock")
    second = block(first, "AllInOneBlock", start)
    nested = graph([start, first, second, framework.OutputNode(second)])
    assert _reasons(nested)[""] == "a condition is the output of a layer"


def _reasons(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.reason for layer in accelerate(model).left if layer.kind.startswith("FrEIA.")}


def test_errors_are_those_of_the_stock_model():
    fast, _ = accelerated(build("two-ended glow"))
    inputs, conditions = inputs_of("two-ended glow")
    for given, c in (((inputs[0], inputs[0]), conditions), (inputs, [])):
        with pytest.raises(ValueError, match="expected 1"):
            fast(given, c=c)
    with pytest.raises(RuntimeError, match="AllInOneBlock"):
        fast(inputs, c=[conditions[0][:, :1]])


def test_compiles():
    fast, _ = accelerated(build("older sequence"))
    inputs, _ = inputs_of("older sequence")
    compiled = torch.compile(fast, backend="eager")
    torch.testing.assert_close(compiled(inputs[0]), fast(inputs[0]), rtol=1e-5, atol=1e-5)
