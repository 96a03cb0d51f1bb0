"""What the tests of all adapters compare by: a stock model and its accelerated copy, with trained-like weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hflow_fast import accelerate
from hflow_fast.adapters import AccelerationReport
from hflow_fast.nn import _fusion

Call = Callable[..., Any]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run, in order."""
    ran: list[str] = []
    for name in ("conv1x1", "coupling", "flow_step"):
        function = getattr(_fusion, name)
        monkeypatch.setattr(_fusion, name, lambda *arguments, name=name, function=function, **options: (
            ran.append(name), function(*arguments, **options))[1])
    return ran


def perturbed(model: nn.Module, scale: float = 0.1, seed: int = 0) -> nn.Module:
    """``model`` itself, every parameter moved by noise: no zeros, no identity, nothing a mistake could hide behind.

    Initialise it from data first where the library does so on the first call.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter) * scale)
    return model


def accelerated(model: nn.Module) -> tuple[nn.Module, AccelerationReport]:
    """An accelerated copy, and the report of it."""
    fast = copy.deepcopy(model)
    return fast, accelerate(fast)


def assert_same(stock: nn.Module, fast: nn.Module, *inputs: Any, call: Call = lambda model, *inputs: model(*inputs),
                rtol: float = 1e-5, exact: bool = True) -> None:
    """Outputs, gradients of all parameters and of the inputs agree, in shape, dtype and value.

    Both draw the same random numbers.

    Args:
        stock, fast: a model and its accelerated copy, in the dtype of the inputs.
        inputs: tensors, nested in tuples and lists, or anything else.
        call: what to evaluate; it returns tensors, nested in tuples and lists.
        rtol: allowed error, relative to the largest value of a tensor.
        exact: measure the error from the stock model in float64, and allow for twice what the stock model itself is
            off by. False compares with the stock model, such as where random numbers differ between dtypes.
    """
    expected, got = outcome(stock, call, inputs), outcome(fast, call, inputs)
    assert expected.keys() == got.keys()
    truth = outcome(copy.deepcopy(stock).double(), call, _double(inputs)) if exact else expected
    for name, value in expected.items():
        assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
        if not value.is_floating_point():
            assert torch.equal(got[name], value), name
            continue
        reference = truth[name].double()
        own = (value.double() - reference).abs().max().item() if value.numel() else 0.0
        off = (got[name].double() - reference).abs().max().item() if value.numel() else 0.0
        largest = reference.abs().max().item() if value.numel() else 0.0
        assert off <= 2 * own + rtol * largest, f"{name}: off by {off:.3g} where {largest:.3g} is the largest value " \
                                                f"and the stock model is off by {own:.3g}"


def outcome(model: nn.Module, call: Call, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Every output of a call by its position, and every gradient of a random projection of them by its name."""
    leaves = [tensor for tensor in _tensors(inputs)]
    grown = {id(leaf): leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    outputs = list(_tensors(call(model, *_mapped(inputs, lambda tensor: grown[id(tensor)]))))
    found = {f"output {index}": output.detach().clone() for index, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(1)
    # Of all outputs: one model may know that an output is constant, and the other not.
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output) for output in outputs]
    terms = [(output * weight).sum() for output, weight in zip(outputs, weights) if output.requires_grad]
    if terms:
        torch.stack([term.double() for term in terms]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.clone()
    for index, leaf in enumerate(leaves):
        if grown[id(leaf)].grad is not None:
            found[f"gradient of input {index}"] = grown[id(leaf)].grad.clone()
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(part, function) for part in value) if isinstance(value, (tuple, list)) else value


def _double(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
