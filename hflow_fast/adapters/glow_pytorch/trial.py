"""Whether a class that is named and built like one we know does what that one does.

Names and shapes do not tell σ(s + 2) from e^s. So a layer is tried: a copy of it with weights as if trained, and with
a random function for a network, runs its own code and the fused one on the same input, in both directions. The layer
itself is not touched, and neither is the state of random numbers.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ...nn._hooks import HOOKS
from ..accelerate import stock_class
from .port import Port, fast_class

__all__ = ["disagreement", "misfit"]

_TOLERANCE = 1e-4
_BATCH, _HEIGHT, _WIDTH = 2, 4, 8
_SPREADS = (2.0, 12.0)
"""Of raw scales and shifts: one to tell formulas apart by, and one that reaches where a clamp shows."""
_INNER_SPREAD = 1.0
"""Of those of layers inside, which are tried by themselves: a chain of wide ones rounds too much to compare."""


def misfit(port: type[Port], module: nn.Module) -> str | None:
    """What of ``module`` is not built as ``port`` expects; None: nothing."""
    stock = stock_class(module) or type(module)
    for method, expected in port.methods.items():
        function = getattr(stock, method, None)
        if function is None:
            return f"it has no {method}()"
        found = tuple(inspect.signature(function).parameters)[1:]
        if len(found) != len(expected) or found[1:] != expected[1:]:
            return f"its {method}() takes ({', '.join(found)})"
    for attribute in port.attributes:
        if not hasattr(module, attribute):
            return f"it has no {attribute}"
    taken = port.own_names() & (vars(module).keys() | vars(stock).keys())
    if taken:
        return f"it has a {min(taken)} of its own"
    try:
        expected_shapes, children = port.layout(module), port.children_of(module)
    except (AttributeError, IndexError, TypeError) as error:
        return str(error)
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected_shapes:
        return f"it holds {', '.join(f'{name} {shape}' for name, shape in shapes.items()) or 'no tensors'}"
    if module._modules.keys() != children.keys():
        return f"it consists of {', '.join(module._modules) or 'nothing'}"
    for name, ports in children.items():
        for member in _members(module._modules[name]) if ports else []:
            reasons = [misfit(child, member) for child in ports]
            if all(reasons):
                return f"its {name}: {reasons[0]}"
    return None


def _members(child: nn.Module) -> list[nn.Module]:
    return list(child) if isinstance(child, nn.ModuleList) else [child]


def disagreement(port: type[Port], module: nn.Module) -> str | None:
    """How ``module``, which is built as ``port`` expects, behaves otherwise; None: as expected."""
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        x = _random((_BATCH, port.channels(module), _HEIGHT, _WIDTH), generator).to(device)
        with warnings.catch_warnings(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            warnings.simplefilter("ignore")
            agrees = all(_agree(*(_tried(port, twin(port, module, fast, device, spread), x) for fast in (False, True)))
                         for spread in _SPREADS)
    except Exception as error:  # whatever code this is, it stays as it is
        return f"cannot be tried on a random input ({type(error).__name__}: {error})"
    return None if agrees else f"behaves otherwise than the one of {port.origin}"


def _tried(port: type[Port], layer: nn.Module, x: Tensor) -> list[Any]:
    """What is seen of it, with the same random numbers every time, and none of anyone else's taken."""
    device = x.device
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    else:
        generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(0)
        return port.run_trial(layer, x)
    finally:
        generator.set_state(state)


def _agree(expected: Any, got: Any) -> bool:
    if isinstance(expected, list):
        return len(expected) == len(got) and all(map(_agree, expected, got))
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return expected is None and got is None
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    return bool((expected - got).abs().amax() <= _TOLERANCE * (1 + expected.abs().amax()))


def twin(port: type[Port], module: nn.Module, fast: bool, device: torch.device, spread: float,
         seed: int = 1) -> nn.Module:
    """A copy to be tried, in float32 and eval mode, the stock or the fast one; a seed gives both the same values."""
    generator = torch.Generator("cpu").manual_seed(seed)
    stock = stock_class(module) or type(module)
    double = object.__new__(fast_class(port, stock) if fast else stock)
    vars(double).update((name, value) for name, value in vars(module).items() if not name.startswith("_fused_"))
    vars(double).update({"training": False}, **{hooks: {} for hooks in HOOKS})
    vars(double)["_parameters"] = {
        name: None if parameter is None else nn.Parameter(
            port.example(name, parameter.shape, generator).to(device, torch.float32), requires_grad=False)
        for name, parameter in module._parameters.items()}
    vars(double)["_buffers"] = {name: _copied(buffer) for name, buffer in module._buffers.items()}
    networks, children = port.networks(module), port.children_of(module)
    vars(double)["_modules"] = {
        name: _Network(*networks[name], spread, generator).to(device) if name in networks
        else _twin_of_child(port, children[name], child, fast, device, _INNER_SPREAD, seed + position)
        for position, (name, child) in enumerate(module._modules.items(), start=1)}
    for name, value in vars(module).items():
        if isinstance(value, FunctionType):
            vars(double)[name] = _rebound(value, module, double)
    port.prepare(double)
    return double


def _twin_of_child(parent: type[Port], ports: tuple[type[Port], ...], child: nn.Module, fast: bool,
                   device: torch.device, spread: float, seed: int) -> nn.Module:
    if not ports:
        return copy.deepcopy(child).to(device, torch.float32).eval()
    members = [twin(next(port for port in ports if misfit(port, member) is None), member, fast, device,
                    spread, 10 * seed + position)
               for position, member in enumerate(parent.enough(_members(child)))]
    return nn.ModuleList(members) if isinstance(child, nn.ModuleList) else members[0]


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _copied(buffer: Tensor | None) -> Tensor | None:
    if buffer is None:
        return None
    return buffer.float().clone() if buffer.is_floating_point() else buffer.clone()


def _rebound(function: FunctionType, module: nn.Module, double: nn.Module) -> FunctionType:
    """A function that ``module`` keeps and that refers to it, for its copy."""
    cells = tuple(CellType(double) if cell.cell_contents is module else cell for cell in function.__closure__ or ())
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)


class _Network(nn.Module):
    """A random function of every pixel, in place of a network."""

    def __init__(self, inputs: int, outputs: int, spread: float, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("weight", _random((outputs, inputs, 1, 1), generator) * (spread / inputs**0.5))
        self.register_buffer("bias", _random((outputs,), generator))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(torch.tanh(x), self.weight, self.bias)
