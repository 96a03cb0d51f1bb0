from __future__ import annotations

import pytest
import torch

from hflow_fast import reference
from hflow_fast.ops import bias_act

from ._cases import DTYPES, assert_accurate, atol_of, tensor

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_without_bias_or_residual(dtype, memory):
    generator = torch.Generator().manual_seed(0)
    x, residual = (tensor((2, 5, 9, 13), d, memory, generator) for d in (torch.bfloat16, dtype))
    bias = tensor((5,), dtype, memory, generator)
    options = {"activation": "leaky_relu", "gain": 0.7}
    for others in ((None, residual), (bias, None), (None, None)):
        given = [t for t in others if t is not None]

        def bound(function, others=others):
            def call(x, *given):
                given = iter(given)
                return (function(x, *(None if t is None else next(given) for t in others), **options),)

            return call

        assert_accurate(bound(bias_act), bound(reference.bias_act), (x, *given), atol_of(x, *given))


@pytest.mark.parametrize("function", [bias_act, reference.bias_act])
def test_by_hand(function):
    x, bias = torch.tensor([[-3.0, 1.0]]), torch.tensor([1.0, 1.0])
    residual = torch.tensor([[1.0, 2.0]])
    y = function(x, bias, residual, activation="leaky_relu", slope=0.25, gain=10.0)
    torch.testing.assert_close(y, torch.tensor([[5.0, 40.0]]))
    torch.testing.assert_close(function(x, activation="tanh"), torch.tanh(x))
    assert torch.equal(function(x), x)


def test_the_slope_is_leaky_relus_derivative_at_zero():
    x = torch.zeros(1, 2, requires_grad=True)
    bias_act(x, activation="leaky_relu", slope=0.1).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((1, 2), 0.1))


@pytest.mark.parametrize("function", [bias_act, reference.bias_act])
@pytest.mark.parametrize(
    ("x", "bias", "residual", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2), None, r"bias_act: bias must have shape \(3,\), got \(2,\)"),
        (torch.zeros(2, 3), None, torch.zeros(2, 4), r"residual must have the shape of x, \(2, 3\), .* got \(2, 4\)"),
        (torch.zeros(2, 3), None, torch.zeros(2), r"residual must have the shape of x, \(2, 3\), .* got \(2,\)"),
        (torch.zeros(2, 3), None, torch.zeros(0), r"residual must have the shape of x, \(2, 3\), .* got \(0,\)"),
        (torch.zeros(3), None, None, r"bias_act: x must have shape \(B, C, ...\), got \(3,\)"),
        (torch.zeros(2, 3).int(), torch.zeros(3), None, "bias_act: x must be float32, .* got"),
        (torch.zeros(2, 3), torch.zeros(3).bool(), None, "bias_act: bias must be float32, .* got"),
        (torch.zeros(2, 3), None, torch.zeros(2, 3).bool(), "bias_act: residual must be float32, .* got"),
    ],
)
def test_bad_input_is_named(function, x, bias, residual, message):
    with pytest.raises(ValueError, match=message):
        function(x, bias, residual)


@pytest.mark.parametrize("function", [bias_act, reference.bias_act])
def test_unknown_activation_is_named(function):
    with pytest.raises(ValueError, match="activation must be one of linear, leaky_relu, tanh, got 'relu'"):
        function(torch.zeros(2, 3), activation="relu")


@pytest.mark.parametrize("number", [-1, 3])
def test_bad_arguments_of_the_kernel_are_named(number):
    x, bias, none = torch.zeros(2, 3), torch.zeros(3), torch.zeros(0)
    with pytest.raises(ValueError, match=f"bias_act: activation must be from 0 to 2, got {number}"):
        torch.ops.hflow_fast.bias_act_fwd(x, bias, none, number, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"bias_act: grad_y must have the shape of x, \(2, 3\), .* got \(2, 4\)"):
        torch.ops.hflow_fast.bias_act_bwd(x, bias, none, torch.zeros(2, 4), 0, 0.1, 1.0)
