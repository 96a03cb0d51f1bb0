"""Derivatives of every operation: first, second or an error that says so, and those that torch.func would take."""

from __future__ import annotations

import pytest
import torch

from hflow_fast import ops

from ._table import every_device, every_example, every_row, kernel_calls


@every_device
@every_example()
def test_gradcheck(row, call, device):
    fast = max(shape[-1] for shape in call.shapes) > 20  # one random direction instead of every entry
    tensors = [t.requires_grad_() for t in row.inputs(call, device=device)]
    assert torch.autograd.gradcheck(row.function(call), tensors, fast_mode=fast)


@every_device
@every_example()
def test_second_derivatives_are_right_or_refused(row, call, device):
    fast = max(shape[-1] for shape in call.shapes) > 20
    tensors = [t.requires_grad_() for t in row.inputs(call, device=device)]
    kernels = kernel_calls(row.function(call), tensors)
    if row.twice or not kernels:
        assert torch.autograd.gradgradcheck(row.function(call), tensors, fast_mode=fast)
        return
    once = "|".join({op.__name__.partition("_fwd")[0] for op, _ in kernels})  # many channels: a coupling, then torch
    total = sum(output.square().sum() for output in row.function(call)(*tensors))
    gradients = torch.autograd.grad(total, tensors, create_graph=True)
    for gradient in gradients if once == row.name else gradients[:1]:
        with pytest.raises(RuntimeError, match=f"ops.({once}) has no second derivative; .*reference.({once})"):
            gradient.sum().backward(retain_graph=True)


@every_device
@every_row
def test_some_of_the_gradients_alone(row, device):
    call = row.examples[0]
    tensors = row.inputs(call, device=device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(sum(output.sum() for output in row.function(call)(*leaves)), leaves)
    for place in range(len(tensors)):
        alone = [t.clone().requires_grad_(i == place) for i, t in enumerate(tensors)]
        sum(output.sum() for output in row.function(call)(*alone)).backward()
        torch.testing.assert_close(alone[place].grad, expected[place])
    for place in range(len(row.function(call)(*leaves))):  # the gradient of one output alone
        output = row.function(call)(*leaves)[place]
        if output.requires_grad:
            ours = torch.autograd.grad(output.sum(), leaves, materialize_grads=True)
            theirs = torch.autograd.grad(
                row.reference(call)(*leaves)[place].sum(), leaves, materialize_grads=True, allow_unused=True
            )
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_device
@every_row
def test_forward_mode_and_functional_transforms_are_refused(row, device):
    call = row.examples[0]
    x, *others = row.inputs(call, device=device)
    function = lambda t: row.function(call)(t, *others)[0]  # noqa: E731
    if not kernel_calls(row.function(call), [x, *others]):
        return
    with pytest.raises(RuntimeError, match=f"ops.{row.name} has no forward-mode derivative .*reference.{row.name}"):
        torch.func.jvp(function, (x,), (x,))
    for transform in (torch.func.grad(lambda t: function(t).sum()), torch.func.jacrev(function)):
        with pytest.raises(RuntimeError, match=f"ops.{row.name} does not work in torch.func.grad"):
            transform(x)


def test_forward_mode_elsewhere_is_no_obstacle():
    x, zeros = torch.randn(2, 3), torch.zeros(3)
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(ops.actnorm(x, zeros, zeros)[0], x)
