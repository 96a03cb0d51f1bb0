"""What may stand in the way of giving a layer another class, whatever its library."""

from __future__ import annotations

import sys
from typing import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..nn._hooks import is_watched
from .report import Match

__all__ = ["Survey", "wrapper_of"]

_METHODS = ("forward", "inverse", "reverse", "log_prob", "sample")
_DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Survey:
    """Where the modules and parameters of a model are, to judge each of its layers by."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[str]] = {}
        self._holders: dict[int, dict[int, str]] = {}
        self._wrapped: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            places = self._places.setdefault(id(module), [])
            places.append(name)
            if len(places) > 1:
                continue
            for parameter in module.parameters(recurse=False):
                self._holders.setdefault(id(parameter), {})[id(module)] = name
            wrapper = wrapper_of(module)
            if wrapper is not None:
                self._wrapped.update((id(inner), wrapper) for inner in module.modules())

    def obstacle(self, layer: nn.Module, match: Match) -> str | None:
        """Why ``layer`` has to stay as it is; None: it need not."""
        if id(layer) in self._wrapped:
            return self._wrapped[id(layer)]
        whole = list(layer.modules())
        called = {id(inner) for child in match.calls for inner in child.modules()}
        own = [module for module in whole if id(module) not in called]
        inside = {id(module) for module in whole}
        for module in own:
            obstacle = self._shared(module) or _of_module(module) or self._tied(module, inside)
            if obstacle is not None:
                return obstacle if module is layer else f"its {type(module).__name__} {obstacle}"
        return _of_tensors(own) or _of_devices(whole)

    def _shared(self, module: nn.Module) -> str | None:
        places = self._places[id(module)]
        return f"is in {len(places)} places, {', '.join(places)}" if len(places) > 1 else None

    def _tied(self, module: nn.Module, inside: set[int]) -> str | None:
        for name, parameter in module.named_parameters(recurse=False):
            outside = [place for holder, place in self._holders[id(parameter)].items() if holder not in inside]
            if outside:
                return f"has tied weights: {name} is also a parameter of {outside[0] or 'the model'}"
        return None


def wrapper_of(module: nn.Module) -> str | None:
    """What made more of ``module`` than its class says, and has to come after; None: nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted; accelerate the model before torch.jit"
    compiled = _loaded("torch._dynamo.eval_frame", "OptimizedModule")
    if isinstance(module, compiled) or module._compiled_call_impl is not None:
        return "is compiled; accelerate the model before torch.compile"
    if isinstance(module, _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")):
        return "is sharded; accelerate the model before FullyShardedDataParallel"
    return None


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """A class, if anyone can have an instance of it: importing the module takes seconds."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def _of_module(module: nn.Module) -> str | None:
    if is_watched(module):
        return "has hooks, which would not be called"
    replaced = [name for name in _METHODS if name in vars(module)]
    if replaced:
        return f"has a {replaced[0]} of its own, set on the instance"
    if nn.utils.parametrize.is_parametrized(module):
        return "is parametrized (torch.nn.utils.parametrize)"
    return None


def _of_tensors(modules: Iterable[nn.Module]) -> str | None:
    for name, tensor in _tensors(modules):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its {name} is a {type(tensor).__name__}"
        computes = tensor.is_floating_point() or tensor.is_complex()  # others are indices, such as permutations
        if isinstance(tensor, nn.Parameter) and computes and tensor.dtype not in _DTYPES:
            return f"its {name} is {tensor.dtype}"
    return None


def _of_devices(modules: Iterable[nn.Module]) -> str | None:
    # Scalars take part in anything, wherever they are.
    devices = sorted({str(tensor.device) for _, tensor in _tensors(modules) if tensor.dim()})
    if len(devices) > 1:
        return f"its tensors are on several devices, {', '.join(devices)}"
    if devices and torch.device(devices[0]).type not in _DEVICES:
        return f"it is on device {devices[0]}; there are kernels for {' and '.join(_DEVICES)}"
    return None


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for module in modules:
        yield from module.named_parameters(recurse=False)
        yield from module.named_buffers(recurse=False)
