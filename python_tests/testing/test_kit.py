"""What the property tests do besides passing and failing: leave no trace, take other signatures, explain themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from hflow_fast.nn import ActNorm, AffineCoupling, InvConv1x1, Sequential
from hflow_fast.testing import assert_invertible, assert_log_det, randomize

SHAPE = (2, 4, 3, 3)


@pytest.fixture
def flow():
    torch.manual_seed(0)
    return Sequential(ActNorm(4), InvConv1x1(4), AffineCoupling(nn.Conv2d(2, 4, 1)))


def everything(module):
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: (t, t.data_ptr(), t.dtype, t.detach().clone()) for name, t in tensors.items()}


def assert_untouched(before, module):
    after = everything(module)
    assert before.keys() == after.keys()
    for (a, *a_facts, a_value), (b, *b_facts, b_value) in zip(before.values(), after.values(), strict=True):
        assert a is b and a_facts == b_facts and torch.equal(a_value, b_value)


@pytest.mark.parametrize("passes", [True, False])
def test_a_layer_leaves_as_it_came(flow, passes):
    if not passes:
        flow[2].inverse = flow[2].forward
    flow[1].requires_grad_(False)
    flow[2].eval()
    flow[2].net.bias.grad = torch.ones(4)
    random_state, before = torch.get_rng_state(), everything(flow)
    for assertion, dtype in ((assert_invertible, torch.float64), (assert_log_det, torch.float32)):
        if passes or assertion is assert_log_det:
            assertion(flow, SHAPE, dtype=dtype)
        else:
            with pytest.raises(AssertionError):
                assertion(flow, SHAPE, dtype=dtype)
        assert_untouched(before, flow)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not flow[0].is_initialized  # data-dependent initialisation is still to come
    assert flow[0].training and not flow[2].training
    assert torch.equal(flow[2].net.bias.grad, torch.ones(4)) and not flow[1].lower.requires_grad


def test_caches_are_right_afterwards(flow):
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = flow.eval()(x), flow.inverse(x)
        assert_invertible(flow, SHAPE)
        after = flow(x), flow.inverse(x)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_randomized_weights_differ_everywhere_and_by_seed_alone(flow):
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    with randomize(flow, seed=3):
        first = {name: p.detach().clone() for name, p in flow.named_parameters()}
        assert all((first[name] != before[name]).all() for name in before)
    with randomize(flow, seed=3):
        assert all(torch.equal(p, first[name]) for name, p in flow.named_parameters())
    with randomize(flow, seed=4):
        assert not any(torch.equal(p, first[name]) for name, p in flow.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in flow.named_parameters())


@pytest.mark.parametrize("channels", [1, 3, 16, 48])
def test_randomized_rotations_stay_invertible(channels):
    layer = InvConv1x1(channels, "full")
    for seed in range(5):
        with randomize(layer, seed), torch.no_grad():
            values = torch.linalg.svdvals(layer.weight)
            assert 0.05 < values.min() and values.max() < 2.5


def test_randomizing_reverts_after_an_error(flow):
    before = everything(flow)
    with pytest.raises(KeyError), randomize(flow):
        flow.extra, flow[0].training = 1, False
        flow.register_buffer("new", torch.zeros(1))
        flow[0].bias = nn.Parameter(torch.ones(4))
        raise KeyError
    assert_untouched(before, flow)
    assert not hasattr(flow, "extra") and not hasattr(flow, "new") and flow[0].training


def test_a_pair_of_functions_with_a_module():
    module = nn.Linear(3, 3)

    def forward(x, context):
        scale = module(context).exp()
        return x * scale, scale.log().sum(1)

    def inverse(z, context):
        scale = module(context).exp()
        return z / scale, -scale.log().sum(1)

    before = everything(module)
    context = torch.randn(4, 3)
    assert_invertible((forward, inverse), (4, 3), context=context, module=module)
    assert_log_det(forward, (4, 3), context=context, module=module)
    assert_untouched(before, module)


def test_data_of_a_limited_domain():
    logit = (lambda x: (torch.logit(x), -(x.log() + (1 - x).log()).sum(1)), lambda z: (
        torch.sigmoid(z), (nn.functional.logsigmoid(z) + nn.functional.logsigmoid(-z)).sum(1)))
    x = torch.rand(5, 3) * 0.98 + 0.01
    assert_invertible(logit, (5, 3), x=x)
    assert_log_det(logit[0], (5, 3), x=x)
    with pytest.raises(AssertionError, match="got nan"):
        assert_invertible(logit, (5, 3))


def test_integer_contexts_stay_integers():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Embedding(10, 3)

        def forward(self, x, context):
            return x + self.shift(context), x.new_zeros(len(x))

        def inverse(self, z, context):
            return z - self.shift(context), z.new_zeros(len(z))

    assert_invertible(Classes(), (4, 3), context=torch.tensor([1, 9, 0, 1]))
    assert_log_det(Classes(), (4, 3), context=torch.tensor([1, 9, 0, 1]))


def test_batch_statistics_are_allowed_on_request():
    def centre(x):
        return 2 * x - x.mean(0), torch.full((len(x),), 3 * torch.tensor(1.75).log().item(), dtype=x.dtype)

    with pytest.raises(AssertionError, match="sample 0 depends on sample 1, .* independent=False allows it"):
        assert_log_det(centre, (4, 3))
    assert_log_det(centre, (4, 3), independent=False)


def test_a_tolerance_replaces_the_derived_one():
    rough = (lambda x: (x * 2, torch.full((len(x),), 2.0794415)), lambda z: (z * 0.5005, torch.full((len(z),), -2.079)))
    with pytest.raises(AssertionError, match="inverse"):
        assert_invertible(rough, (4, 3))
    assert_invertible(rough, (4, 3), tolerance=1e-2)
    with pytest.raises(AssertionError, match=r"log_det of the inverse.*off by 0.00044.* where 0.00030"):
        assert_invertible((rough[0], lambda z: (z / 2, torch.full((len(z),), -2.079))), (4, 3), tolerance=1e-4)
    assert_log_det(lambda x: (x * 2, x.new_full((len(x),), 2.08)), (4, 3), tolerance=1e-2)


def test_layers_without_float64_need_a_tolerance():
    class OnlyFloat32(nn.Module):
        def forward(self, x):
            return torch.nn.functional.linear(x, 2 * torch.eye(3)), x.new_full((len(x),), 2.0794415)

        def inverse(self, z):
            return z / 2, z.new_full((len(z),), -2.0794415)

    with pytest.raises(ValueError, match="has to run in float64 for this, and fails there: .*dtype"):
        assert_invertible(OnlyFloat32(), (4, 3))
    assert_invertible(OnlyFloat32(), (4, 3), tolerance=1e-6)


def test_mistakes_are_explained(flow):
    with pytest.raises(ValueError, match="has no inverse; give a pair"):
        assert_invertible(lambda x: (x, x.new_zeros(len(x))), (2, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(2, 3\), got \(2, 4\)"):
        assert_invertible(flow, (2, 3), x=torch.zeros(2, 4))
    for shape in ((3,), (2, 0, 4, 4)):
        with pytest.raises(ValueError, match=r"shape must be \(B, C, \.\.\.\) and not empty, got"):
            assert_log_det(flow, shape)
    with pytest.raises(ValueError, match="too large; give samples of at most 4096 elements"):
        assert_log_det(flow, (1, 4, 64, 64))


def test_needs_no_test_framework():
    code = "import sys, hflow_fast.testing; print([m for m in ('pytest', 'hypothesis') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_jacobians_of_hundreds_of_values_on_several_threads() -> None:
    """Where torch's own log-dets of a stack are off by tens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_log_det(InvConv1x1(3), (4, 3, 8, 8))
    finally:
        torch.set_num_threads(threads)
