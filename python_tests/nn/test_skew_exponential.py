"""The rotation's exponential against torch's in float64: values, gradients, edges."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hflow_fast.nn.skew_exponential import Squarings, skew_exponential

MODULE = importlib.import_module("hflow_fast.nn.skew_exponential")


def exact(generator: torch.Tensor) -> torch.Tensor:
    generator = generator.double()
    return torch.matrix_exp(generator - generator.mT)


def worst(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (got.double() - expected).abs().max().item()


@pytest.mark.parametrize("size", [1, 2, 5, 33, 200])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 10.0])
def test_is_at_least_as_accurate_as_torch(size, spread):
    generator = torch.randn(3, size, size, generator=torch.Generator().manual_seed(size)) * spread
    expected = exact(generator)
    torchs = worst(torch.matrix_exp(generator - generator.mT), expected)
    got = skew_exponential(generator)
    assert worst(got, expected) <= 2 * torchs + 1e-6
    assert worst(got.double() @ got.double().mT, torch.eye(size).double().expand(3, -1, -1)) < 1e-6
    assert worst(skew_exponential(generator.double()), expected) < 1e-11


def test_gradients():
    generator = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(skew_exponential, generator)
    assert torch.autograd.gradgradcheck(skew_exponential, generator)


def test_large_matrices_are_far_more_accurate_than_torchs():
    """As in the endblock at its start: the norm is about 45, and torch scales by the 1-norm of about 280."""
    generator, weight = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def value_and_gradient(function, dtype):
        leaf = generator.to(dtype, copy=True).requires_grad_()
        value = function(leaf)
        (value * weight).sum().backward()
        return value.detach().double(), leaf.grad

    expected = value_and_gradient(exact, torch.float64)
    torchs = value_and_gradient(lambda a: torch.matrix_exp(a - a.mT), torch.float32)
    ours = value_and_gradient(skew_exponential, torch.float32)
    assert worst(ours[0], expected[0]) < worst(torchs[0], expected[0]) / 2
    assert worst(ours[1], expected[1]) < worst(torchs[1], expected[1]) / 2
    assert worst(ours[1], expected[1]) < 1e-5 * expected[1].abs().max().item()
    identity = torch.eye(256).double()
    assert worst(ours[0] @ ours[0].mT, identity) < worst(torchs[0] @ torchs[0].mT, identity) / 20


def test_a_norm_out_of_reach_is_nan(monkeypatch):
    """With a number of squarings from an earlier, smaller matrix."""
    generator = torch.randn(2, 80, 80, generator=torch.Generator().manual_seed(0))
    bound = MODULE._norm_bound(MODULE._powers(generator - generator.mT)[-1])
    enough = MODULE._needed(float(bound), torch.float32)
    for squarings in (enough - 1, enough, enough + 1):
        monkeypatch.setattr(Squarings, "choose", lambda self, bound, dtype: squarings)
        leaf = generator.clone().requires_grad_()
        value = skew_exponential(leaf, Squarings())
        value.sum().backward()
        if squarings < enough:
            assert value.isnan().all() and leaf.grad.isnan().all()
        else:
            assert worst(value, exact(generator)) < 1e-5


@pytest.mark.parametrize("size", [2, 3, 16, 65, 200])
def test_norm_bound_is_above_and_close(size):
    generator = torch.randn(5, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    generator[1:3] = 0
    generator[1, 0, 1] = 7.0  # one plane
    generator[3] *= 1e-3
    for skew in (generator - generator.mT, (generator - generator.mT)[1:3], (generator - generator.mT)[2:3]):
        bound, norm = MODULE._norm_bound(MODULE._powers(skew)[-1]), torch.linalg.matrix_norm(skew, 2).amax()
        assert norm * (1 - 1e-9) <= bound <= norm * 1.5


class _OnDevice:
    """A norm that lies on a GPU; reading it is counted."""

    is_cuda, dtype, reads = True, torch.float64, 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        _OnDevice.reads += 1
        return self.value


def test_training_on_a_gpu_does_not_wait_for_the_norm(monkeypatch):
    class Event:
        arrived = False

        def query(self) -> bool:
            return Event.arrived

    capturing = False
    monkeypatch.setattr(MODULE, "_send", lambda bound: (bound.value, Event()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(_OnDevice, "reads", 0)
    squarings, small, large = Squarings(), _OnDevice(10.0), _OnDevice(100.0)
    few, many = (MODULE._needed(bound.value, torch.float32) for bound in (small, large))
    assert few < many
    capturing = True
    with pytest.raises(RuntimeError, match="before capturing"):
        squarings.choose(small, torch.float32)
    capturing = False
    assert squarings.choose(small, torch.float32) == few and _OnDevice.reads == 1  # the first time
    assert squarings.choose(large, torch.float32) == few  # 100 is on its way
    assert squarings.choose(small, torch.float32) == few
    Event.arrived = True
    assert squarings.choose(small, torch.float32) == many
    assert _OnDevice.reads == 1
    capturing = True
    assert squarings.choose(small, torch.float32) == many
    capturing = False
    with torch.no_grad():
        assert squarings.choose(small, torch.float32) == few and _OnDevice.reads == 2


def test_products_are_ieee_whatever_the_program_allows():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
                backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
                seen.append((args[0].dtype, *(backend.fp32_precision for backend in backends)))
            return function(*args, **(kwargs or {}))

    generator = torch.randn(1, 70, 70, requires_grad=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with Watch():
            value = skew_exponential(generator)
            forward = len(seen)
            value.sum().backward()
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert 0 < forward < len(seen)
    assert set(seen) == {(torch.float32, "ieee", "ieee")}


def test_edges():
    assert torch.equal(skew_exponential(torch.zeros(2, 3, 3)), torch.eye(3).expand(2, -1, -1))
    assert skew_exponential(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert skew_exponential(torch.full((1, 2, 2), torch.nan)).isnan().all()
    assert skew_exponential(torch.tensor([[0.0, torch.inf], [0.0, 0.0]])).isnan().all()
    with torch.autocast("cpu", torch.bfloat16):
        got = skew_exponential(torch.ones(2, 4, 4).triu())
    assert got.dtype == torch.float32 and worst(got, exact(torch.ones(2, 4, 4).triu())) < 1e-6
    assert skew_exponential(torch.ones(3, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_compiles_without_a_graph_break():
    generator = torch.randn(2, 4, 4)
    compiled = torch.compile(skew_exponential, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(generator), skew_exponential(generator))
