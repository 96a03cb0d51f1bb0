"""The walker: what it replaces, what it leaves and says, and the way back. Layers are normflows'."""

from __future__ import annotations

import copy
import doctest
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import hflow_fast
from hflow_fast.adapters import AccelerationReport, accelerate, restore

from .conftest import accelerated, assert_same, perturbed

nf = pytest.importorskip("normflows")

ACTNORM, INVCONV, BLOCK = "normflows.ActNorm", "normflows.Invertible1x1Conv", "normflows.AffineCouplingBlock"


def initialised_actnorm(channels: int = 4) -> nn.Module:
    layer = nf.flows.ActNorm((channels, 1, 1))
    layer.inverse(torch.randn(8, channels, 4, 4) * 2 + 1)
    return perturbed(layer)


def coupling_block(channels: int = 4) -> nn.Module:
    net = nf.nets.ConvNet2d([channels // 2, 8, 8, channels], (3, 1, 3))
    return perturbed(nf.flows.AffineCouplingBlock(net, scale_map="sigmoid"))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 4, 4)),
                              [coupling_block(), nf.flows.Invertible1x1Conv(4), initialised_actnorm()])


def reasons(report: hflow_fast.adapters.AccelerationReport) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.left}


def names(layers: tuple) -> set[str]:
    return {layer.name for layer in layers}


ALL = {"", "flows.0", "flows.0.flows.1", "flows.0.flows.1.param_map", "flows.1", "flows.2"}


def assert_left(stock: nn.Module, name: str, reason: str, others: set[str] = frozenset()) -> nn.Module:
    """Layer ``name`` is left for ``reason``, ``others`` too, and the model is the same; returns it, accelerated."""
    fast, report = accelerated(stock)
    assert reason in reasons(report)[name]
    assert names(report.left) == {name, *others}
    assert names(report.replaced) == ALL - {name, *others}
    assert type(fast.get_submodule(name)) is type(stock.get_submodule(name))
    return fast


def test_everything_known_is_replaced_and_reported() -> None:
    stock = model()
    fast, report = accelerated(stock)
    assert names(report.replaced) == ALL and not report.left and not report.already
    kinds = {layer.name: layer.kind for layer in report.replaced}
    assert (kinds[""], kinds["flows.0"], kinds["flows.1"], kinds["flows.2"]) == (
        "normflows.NormalizingFlow", BLOCK, INVCONV, ACTNORM)
    assert_same(stock, fast, torch.randn(2, 4, 4, 4), call=lambda model, x: model.log_prob(x))
    text = str(report)
    assert BLOCK in text and "flows.2" in text and "left" not in text


def test_the_call_is_offered_lazily() -> None:
    assert hflow_fast.accelerate is hflow_fast.adapters.accelerate is accelerate
    code = ("import sys, torch, hflow_fast; hflow_fast.accelerate(torch.nn.Linear(1, 1)); "
            "assert not {'normflows', 'FrEIA', 'nflows'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_in_its_docstring() -> None:
    result = doctest.testmod(sys.modules[accelerate.__module__], extraglobs={"nn": nn})
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("wrong", [None, {"w": torch.zeros(1)}, nn.Linear])
def test_something_else_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="torch.nn.Module"):
        accelerate(wrong)


def test_nothing_known_is_no_error() -> None:
    report = accelerate(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert not report.replaced and "nothing replaced" in str(report)


def test_a_second_time_nothing_is_left_to_do() -> None:
    fast, first = accelerated(model())
    again = accelerate(fast)
    assert not again.replaced and not again.left
    assert again.already == first.replaced
    assert "already fast" in str(again) and "nothing is left to replace" in str(again)


def test_a_single_layer_is_a_model_too() -> None:
    layer = initialised_actnorm()
    report = accelerate(layer)
    assert names(report.replaced) == {""} and "the model" in str(report)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_are_kept_alive(register: str) -> None:
    stock, calls = model(), []
    getattr(stock.flows[2], register)(lambda *arguments: calls.append(1))
    fast = assert_left(stock, "flows.2", "hooks")
    z = torch.randn(2, 4, 4, 4, requires_grad=True)
    fast.forward_and_log_det(z)[0].sum().backward()
    assert len(calls) == 1


def test_a_hook_on_the_whole_model() -> None:
    stock, seen = model(), []
    stock.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    fast = assert_left(stock, "", "hooks")
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(fast(z), stock(z), rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


def test_a_hook_inside_a_layer_counts() -> None:
    stock = model()
    stock.flows[0].flows[0].register_forward_hook(lambda *arguments: None)
    assert_left(stock, "flows.0", "Split has hooks")


def test_a_hook_in_a_network_keeps_that_network() -> None:
    stock, seen = model(), []
    stock.flows[0].flows[1].param_map.net[0].register_forward_hook(lambda *arguments: seen.append(arguments[2].min()))
    fast = assert_left(stock, "flows.0.flows.1.param_map", "Conv2d has hooks")
    fast.log_prob(torch.randn(2, 4, 4, 4))
    assert len(seen) == 1 and seen[0] < 0


def test_tied_weights() -> None:
    stock = model()
    stock.flows.append(nf.flows.Invertible1x1Conv(4))
    stock.flows[3].W = stock.flows[1].W
    fast, report = accelerated(stock)
    assert reasons(report) == {"flows.1": "has tied weights: W is also a parameter of flows.3",
                               "flows.3": "has tied weights: W is also a parameter of flows.1"}
    assert fast.flows[1].W is fast.flows[3].W
    assert_same(stock, fast, torch.randn(2, 4, 4, 4), call=lambda model, x: model.log_prob(x))


def test_a_layer_in_two_places() -> None:
    stock = model()
    stock.flows.append(stock.flows[2])
    fast, report = accelerated(stock)
    assert reasons(report) == {"flows.2": "is in 2 places, flows.2, flows.3"}
    assert_same(stock, fast, torch.randn(2, 4, 4, 4), call=lambda model, x: model.log_prob(x))


def test_a_network_of_two_couplings() -> None:
    stock = model()
    stock.flows.append(nf.flows.AffineCouplingBlock(stock.flows[0].flows[1].param_map, scale_map="sigmoid"))
    fast, report = accelerated(stock)
    assert list(reasons(report)) == ["flows.0.flows.1.param_map"]
    assert_same(stock, fast, torch.randn(2, 4, 4, 4), call=lambda model, x: model.log_prob(x))


class OwnActNorm(nf.flows.ActNorm):
    """A non-standard subclass."""

    def inverse(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().inverse(2 * z)


def test_a_subclass_may_do_anything() -> None:
    stock = model()
    stock.flows[2].__class__ = OwnActNorm
    fast = assert_left(stock, "flows.2", f"subclass of {ACTNORM}")
    assert_same(stock, fast, torch.randn(2, 4, 4, 4), call=lambda model, x: model.log_prob(x))


class OwnFlow(nf.flows.Flow):
    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, float]:
        return z + 1, 0.0

    def inverse(self, z: torch.Tensor) -> tuple[torch.Tensor, float]:
        return z - 1, 0.0


def test_an_unknown_layer() -> None:
    stock = model()
    stock.flows.insert(1, OwnFlow())
    fast, report = accelerated(stock)
    assert reasons(report) == {"flows.1": "has no fused form"}
    assert "adapters.OwnFlow" in str(report)
    assert_same(stock, fast, torch.randn(2, 4, 4, 4), call=lambda model, x: model.log_prob(x))


def test_a_method_set_on_the_instance() -> None:
    stock = model()
    stock.flows[2].inverse = lambda z: (z, 0)
    assert_left(stock, "flows.2", "inverse of its own")


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_parametrization() -> None:
    stock = model()
    nn.utils.parametrize.register_parametrization(stock.flows[1], "W", Doubled())
    fast, report = accelerated(stock)
    assert "parametrized" in reasons(report)["flows.1"]
    assert_same(stock, fast, torch.randn(2, 4, 4, 4), call=lambda model, x: model.log_prob(x))


@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_normalised_network_stays(normalise) -> None:
    stock, fast = model(), model()  # the older kind cannot be copied
    for each in (stock, fast):
        normalise(each.flows[0].flows[1].param_map.net[0])
    assert names(accelerate(fast).left) == {"flows.0.flows.1.param_map"}
    assert_same(stock, fast, torch.randn(2, 4, 4, 4), call=lambda model, x: model.log_prob(x), exact=False)


def test_not_initialised_yet() -> None:
    stock = model()
    stock.flows[2].data_dep_init_done.zero_()
    fast = assert_left(stock, "flows.2", "not initialised")
    x = 3 * torch.randn(16, 4, 4, 4) + 2
    torch.testing.assert_close(fast.log_prob(x), stock.log_prob(x))
    torch.testing.assert_close(fast.flows[2].s, stock.flows[2].s)
    assert names(accelerate(fast).replaced) == {"flows.2"}


@pytest.mark.parametrize("device", ["meta"])
def test_another_device(device: str) -> None:
    stock = model().to(device)
    report = accelerate(stock)
    assert not report.replaced and "it is on device meta" in reasons(report)["flows.1"]


def test_a_layer_on_two_devices() -> None:
    stock = model()
    stock.flows[2].t = nn.Parameter(stock.flows[2].t.to("meta"))
    report = accelerate(stock)
    assert "several devices, cpu, meta" in reasons(report)["flows.2"]
    assert "several devices, cpu, meta" in reasons(report)[""]
    assert names(report.left) == {"", "flows.2"}


class OwnTensor(torch.Tensor):
    pass


def test_parameters_of_another_kind() -> None:
    stock = model()
    stock.flows[1].W = nn.Parameter(stock.flows[1].W.detach().as_subclass(OwnTensor))
    assert reasons(accelerate(stock)) == {"flows.1": "its W is a OwnTensor"}


def test_compiled_models() -> None:
    with pytest.raises(ValueError, match="before torch.compile"):
        accelerate(torch.compile(model()))
    stock = model()
    stock.flows[0] = torch.compile(stock.flows[0])
    stock.flows[1].compile()
    report = accelerate(stock)
    assert "before torch.compile" in reasons(report)["flows.0._orig_mod"]
    assert "before torch.compile" in reasons(report)["flows.1"]
    assert names(report.replaced) == {"", "flows.2"}


def test_scripted_models() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="before torch.jit"):
        accelerate(scripted)
    assert names(accelerate(nn.ModuleList([scripted, initialised_actnorm()])).replaced) == {"1"}


def test_distributed_models(tmp_path) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.flow.forward_kld(x)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stock = nn.parallel.DistributedDataParallel(Loss())
        fast = nn.parallel.DistributedDataParallel(copy.deepcopy(stock.module))
        assert names(accelerate(fast).replaced) == {f"module.flow.{name}".rstrip(".") for name in ALL}
        assert_same(stock, fast, torch.randn(2, 4, 4, 4), exact=False)
    finally:
        torch.distributed.destroy_process_group()


def test_an_adapter_that_does_not_load(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "hflow_fast.adapters.normflows")
    monkeypatch.delattr(nf, "MultiscaleFlow")
    report = accelerate(nn.Linear(1, 1))
    assert "its adapter does not fit this version" in str(report)


def test_the_reference_is_mentioned(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[AccelerationReport.__module__.replace("report", "accelerate")], "has_kernel",
                        lambda op, device: False)
    assert "plain torch reference" in str(accelerate(model()))


def test_restore_takes_everything_back() -> None:
    stock = model()
    fast, _ = accelerated(stock)
    x = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        fast.log_prob(x), fast.sample(2)
    assert set(restore(fast)) == ALL
    assert [type(module) for module in fast.modules()] == [type(module) for module in stock.modules()]
    assert b"hflow_fast" not in pickle.dumps(fast)
    assert torch.equal(fast.log_prob(x), stock.log_prob(x))
    assert restore(fast) == [] and names(accelerate(fast).replaced) == ALL


def test_restore_knows_its_own() -> None:
    ours = hflow_fast.nn.ActNorm(3)
    assert restore(ours) == [] and type(ours) is hflow_fast.nn.ActNorm
