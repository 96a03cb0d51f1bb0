"""Where a value that is not finite comes from: a step repeated with every layer watched."""

from __future__ import annotations

from typing import Any, Iterator

import torch
from torch import Tensor, nn

__all__ = ["diagnose"]


def diagnose(model: nn.Module, passes: Iterator[Tensor]) -> str:
    """Names the first layer and tensor that is not finite. Slow; leaves no gradients behind.

    Looks at the weights, then at each layer's output in the order in which they are computed, then at the gradients
    in theirs.

    Args:
        model: the model.
        passes: each item is computed when it is asked for and is the loss of one pass, with its graph.

    Returns:
        One sentence or two.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _finite(tensor):
            return f"The model's {name} is not finite: {_share(tensor)}."
    watch = _Watch(model)
    try:
        for loss in passes:
            if watch.output is None and not _finite(loss):
                watch.output = "All layers' outputs are finite, but the loss is not."
            if watch.output is not None:
                return watch.output
            loss.backward()
            if watch.gradient is not None:
                return watch.gradient + _parameters(model)
        return _overflow(model)
    finally:
        watch.remove()
        model.zero_grad(set_to_none=True)


class _Watch:
    """Hooks on all layers, and on their outputs' gradients, that keep the first finding of either kind."""

    def __init__(self, model: nn.Module) -> None:
        self.output: str | None = None
        self.gradient: str | None = None
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_hook(self._output_hook(name, module)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._gradient_hook(f"weight {name}")))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _output_hook(self, name: str, module: nn.Module) -> Any:
        layer = f"{name or 'the model'} ({type(module).__name__})"

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.output is not None:
                return
            tensors = list(_tensors(output))
            for index, tensor in enumerate(tensors):
                which = f"output {index} of {layer}" if len(tensors) > 1 else f"output of {layer}"
                if not _finite(tensor):
                    inputs_finite = all(map(_finite, _tensors(inputs)))
                    cause = "finite" if inputs_finite else "not finite either: it arises between two layers"
                    self.output = (f"The first tensor that is not finite is the {which}: {_share(tensor)}, "
                                   f"its inputs are {cause}.")
                    return
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(which))

        return hook

    def _gradient_hook(self, which: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if self.gradient is None and not _finite(gradient):
                self.gradient = (f"The loss and all layers' outputs are finite; the first gradient that is not is that "
                                 f"of the {which}: {_share(gradient)}.")

        return hook


def _parameters(model: nn.Module) -> str:
    bad = [name for name, parameter in model.named_parameters()
           if parameter.grad is not None and not _finite(parameter.grad)]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f" It reaches {len(bad)} weights: {', '.join(bad[:3])}{more}." if bad else ""


def _overflow(model: nn.Module) -> str:
    largest = max(((parameter.grad.abs().max().item(), name) for name, parameter in model.named_parameters()
                   if parameter.grad is not None and parameter.numel()), default=None)
    if largest is None:
        return "Repeated, the step has a finite loss and no gradients."
    return f"Repeated, the step is finite; its largest gradient is {largest[0]:.3g}, of the weight {largest[1]}."


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def _share(tensor: Tensor) -> str:
    return f"{int((~torch.isfinite(tensor)).sum())} of its {tensor.numel()} values are NaN or infinite"
