"""Convolutions with their activation in the same pass."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hflow_fast.models.precision import activate, conv2d
from hflow_fast.ops import _conv_act
from hflow_fast.ops._conv_act import conv_act, is_fusible

if not _conv_act._SERVES:
    pytest.skip("needs a processor with instructions for bfloat16", allow_module_level=True)

SLOPE = 0.1
ACTIVATIONS = pytest.mark.parametrize("activation", ["leaky_relu", "relu", "tanh", "linear"])
# (B, C, H, W), outputs, kernel, padding, groups
CASES = pytest.mark.parametrize("case", [
    ((2, 24, 9, 12), 40, 3, 1, 1), ((3, 70, 8, 8), 20, 1, 0, 1), ((2, 24, 10, 10), 36, 3, 1, 2),
    ((2, 16, 11, 9), 8, 3, 0, 1), ((1, 512, 4, 4), 64, 3, 1, 1), ((4, 6, 1, 1), 5, 3, 1, 1),
])  # fmt: skip


def inputs(shape: tuple[int, ...], outputs: int, kernel: int, padding: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(outputs, shape[1] // groups, kernel, kernel, generator=generator)
    tensors = x, weight / weight[0].numel() ** 0.5, torch.randn(outputs, generator=generator)
    return [t.bfloat16().contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)
            for t in tensors]  # fmt: skip


def separately(x: Tensor, weight: Tensor, bias: Tensor, padding: int, groups: int, activation: str) -> Tensor:
    return activate(F.conv2d(x, weight, bias, padding=padding, groups=groups), activation, SLOPE)


def fused_with(*arguments: Any) -> str | None:
    """What the models' convolution, where it is done this way, has in its pass."""
    found = [None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hflow_fast.models.precision.conv_act", lambda *args: found.append(args[5]) or conv_act(*args))
        result = conv2d(*arguments, "leaky_relu", SLOPE)
    expected = separately(*arguments, "leaky_relu")
    assert (result - expected).norm() <= 0.01 * expected.norm()
    return found[-1]


@CASES
@ACTIVATIONS
def test_rounded_once(case, activation):
    """Beside float64 it is at least as close as the convolution and then the activation, each rounded."""
    *_, padding, groups = case
    tensors = inputs(*case)
    found = conv_act(*tensors, padding, groups, activation, SLOPE)
    usual = separately(*tensors, padding, groups, activation)
    expected = separately(*(t.double() for t in tensors), padding, groups, activation)
    assert (found.shape, found.dtype) == (usual.shape, torch.bfloat16)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).norm() <= 1.001 * (usual - expected).norm()
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    assert ((found - expected).abs() <= 1.01 * half_a_unit * expected.abs() + 1e-5).all()


@CASES
@ACTIVATIONS
def test_gradients(case, activation):
    *_, padding, groups = case
    tensors = [t.requires_grad_() for t in inputs(*case)]
    weights = torch.randn(separately(*tensors, padding, groups, activation).shape,
                          generator=torch.Generator().manual_seed(1))

    def gradients(function, tensors):
        return torch.autograd.grad((function(*tensors) * weights).sum(), tensors)

    found = gradients(lambda *t: conv_act(*t, padding, groups, activation, SLOPE), tensors)
    usual = gradients(lambda *t: separately(*t, padding, groups, activation), tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = gradients(lambda *t: separately(*t, padding, groups, activation), wide)
    for ours, theirs, expected in zip(found, usual, exact, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert (ours - expected).norm() <= 1.1 * (theirs - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(wanted):
    tensors = [t.requires_grad_(want) for t, want in zip(inputs((2, 8, 6, 6), 8, 3, 1, 1), wanted)]
    conv_act(*tensors, 1, 1, "leaky_relu", SLOPE).sum().backward()
    assert tuple(t.grad is not None for t in tensors) == wanted


@CASES
@ACTIVATIONS
def test_the_same_bits_with_gradients_without_and_compiled(case, activation):
    """Or a flow would not be inverted exactly: one direction may be followed, the other not."""
    *_, padding, groups = case
    tensors = inputs(*case)
    alone = conv_act(*tensors, padding, groups, activation, SLOPE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: conv_act(*t, padding, groups, activation, SLOPE), backend="aot_eager",
                             fullgraph=True)
    assert torch.equal(compiled(*tensors), alone)
    followed = conv_act(*(t.requires_grad_() for t in tensors), padding, groups, activation, SLOPE)
    assert followed.requires_grad and torch.equal(followed, alone)


def test_gradients_of_gradients():
    tensors = [t.requires_grad_() for t in inputs((2, 8, 6, 6), 8, 3, 1, 1)]

    def of(function):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(t.float().square().sum() for t in first), tensors)

    found = of(lambda *t: conv_act(*t, 1, 1, "leaky_relu", SLOPE))
    usual = of(lambda *t: separately(*t, 1, 1, "leaky_relu"))
    for ours, theirs in zip(found, usual, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_weights_may_change_and_inputs_too():
    x, weight, bias = inputs((2, 24, 9, 12), 40, 3, 1, 1)
    for change in (lambda: None, lambda: weight.mul_(2), lambda: weight.neg_()):
        change()
        for size in (12, 5, 12):
            shorter = x[..., :size].contiguous(memory_format=torch.channels_last)
            found = conv_act(shorter, weight, bias, 1, 1, "linear", SLOPE)
            assert torch.equal(found, separately(shorter, weight, bias, 1, 1, "linear"))
    with torch.inference_mode():
        fixed = weight.clone()
        conv_act(x, fixed, bias, 1, 1, "linear", SLOPE)
        fixed.zero_()
        assert torch.equal(conv_act(x, fixed, bias, 1, 1, "linear", SLOPE), bias.view(1, -1, 1, 1).expand(2, 40, 9, 12))


def test_a_weight_is_blocked_once_and_forgotten_with_it(monkeypatch):
    blocked = []
    monkeypatch.setattr(_conv_act, "_REORDER", lambda weight, *rest, reorder=_conv_act._REORDER: (
        blocked.append(weight.shape) or reorder(weight, *rest)))
    gc.collect()
    before = len(_conv_act._kept)
    x, weight, bias = inputs((2, 24, 9, 12), 40, 3, 1, 1)
    for _ in range(3):
        conv_act(x, weight, bias, 1, 1, "leaky_relu", SLOPE)
    assert (len(blocked), len(_conv_act._kept)) == (1, before + 1)
    trained = weight.clone().requires_grad_()
    with torch.no_grad():
        conv_act(x, trained, bias, 1, 1, "leaky_relu", SLOPE)
    assert len(blocked) == 1, "a trained weight changes after each use"
    blocked.clear()
    del weight
    gc.collect()
    assert len(_conv_act._kept) == before


def test_where_it_is_used():
    tensors = inputs((2, 24, 24, 24), 80, 3, 1, 1)
    x, weight, bias = tensors
    assert fused_with(*tensors, 1, 1) == "leaky_relu"
    assert fused_with(x[..., :12, :12].contiguous(memory_format=torch.channels_last), weight, bias, 1, 1) == "linear"
    assert fused_with(x.contiguous(), weight, bias, 1, 1) is None
    assert fused_with(*(t.float() for t in tensors), 1, 1) is None
    assert fused_with(x[:0], weight, bias, 1, 1) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_with(*tensors, 1, 1) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_fusible(*tensors)
    singles = torch.func.vmap(lambda one: conv2d(one[None], weight, bias, 1, 1, "tanh")[0])(x)
    assert (singles - conv2d(x, weight, bias, 1, 1, "tanh")).abs().max() < 0.01
