"""What the layers compute from their parameters alone, computed once for many passes.

Parameters are not what convolutions and flows multiply by: weights are scaled (equalised learning rate), rotations are
matrix exponentials, channel maps are folded and their log-dets taken. In training these are the same for all
micro-batches of an optimizer step, in sampling for ever.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor, nn

from ...nn._cache import ParameterCache
from ..precision import NetworkForm
from .affines import FoldedAffines, StepAffines, fold_to_latent
from .layers import Equalized, Together, join

__all__ = ["EffectiveWeights"]


class EffectiveWeights:
    """The effective weights of all layers of ``model``: who computes them, for how long they hold, and the way back.

    =====================  ===================================================================
    :meth:`gathered`       once per block, leaves of the graphs inside; gradients go back at its end
    :meth:`kept`           gradients off: once, until a parameter changes
    neither                each layer computes its own in every pass
    =====================  ===================================================================
    """

    def __init__(self, model: nn.Module) -> None:
        self._together = [group for module in model.modules() for group in getattr(module, "together", ())]
        members = {layer for group in self._together for layer in group.layers}
        alone = [module for module in model.modules() if isinstance(module, Equalized) and module not in members]
        self._users: list[Equalized | Together] = [*alone, *self._together]
        self._layers = [layer for user in self._users for layer in _layers(user)]
        self.affines = [module for module in model.modules() if isinstance(module, StepAffines)]
        self._cache = ParameterCache()
        self._leaves: list[Tensor] | None = None
        self._sums: list[Tensor | None] = []

    def take_form(self, form: NetworkForm) -> None:
        """From now on all layers use their weights in this form, those that are fine in its memory format only."""
        for layer in self._layers:
            layer.form = form._replace(dtype=None) if layer.fine else form
        self._cache = ParameterCache()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, all passes share effective weights and their gradients gather there; the end takes them back.

        Raises:
            RuntimeError: a parameter was changed inside, or the blocks are nested.
        """
        if self._leaves is not None:
            raise RuntimeError("HFlow.prepared: already inside such a block.")
        self._cache = ParameterCache()  # what was kept will not be asked for again
        affines = [module for module in self.affines if module.is_initialized]
        parameters = self._parameters() + [p for module in affines for p in module.parameters()]
        versions = [parameter._version for parameter in parameters]
        with torch.enable_grad():
            outputs = [*self._joined(_Scale.apply(*self._scaling())),
                       *(tensor for folded in fold_to_latent(affines) for tensor in folded)]
        leaves = [output.detach() for output in outputs]
        weights = 2 * len(self._users)
        leaves[:weights] = self._in_form(leaves[:weights])
        for leaf, needed in zip(leaves, self._gradients_needed(affines), strict=True):
            leaf.requires_grad_(needed)
        self._leaves, self._sums = leaves, [None] * len(leaves)
        self._install(leaves, affines)
        try:
            yield
            self.collect()
            sums = self._sums
        finally:
            self._leaves, self._sums = None, []
            self._remove()
        if versions != [parameter._version for parameter in parameters]:
            raise RuntimeError("HFlow.prepared: parameters changed inside the block, whose passes did not see it; take "
                               "the optimizer's step after it.")
        pairs = [(output, total) for output, total in zip(outputs, sums) if total is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs))

    def collect(self) -> None:
        """Adds the gradients of the last pass to the sums, in few launches, where autograd would take one per tensor.

        The sums are float32 or better, whatever the networks compute in.
        """
        if torch.compiler.is_compiling() or self._leaves is None:
            return
        present = [index for index, leaf in enumerate(self._leaves) if leaf.grad is not None]
        latest = _widened([self._leaves[index].grad for index in present])
        totals, gradients = [], []
        for index, gradient in zip(present, latest):
            self._leaves[index].grad = None
            if self._sums[index] is None:
                self._sums[index] = gradient
            else:
                totals.append(self._sums[index])
                gradients.append(gradient)
        if totals:
            torch._foreach_add_(totals, gradients)

    def kept(self) -> AbstractContextManager[None]:
        """Inside, where gradients are off, layers use scaled weights that are computed anew after parameters change."""
        if torch.compiler.is_compiling() or self._leaves is not None or torch.is_grad_enabled():
            return nullcontext()
        return self._kept()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        scaled = self._cache.get("scaled", self._parameters(),
                                 lambda: self._in_form(self._joined(_scaled(*self._scaling()))))
        self._install(scaled, ())
        try:
            yield
        finally:
            self._remove()

    def _scaling(self) -> list[Any]:
        scales = [scale for layer in self._layers for scale in (layer.weight_scale, layer.bias_scale)]
        return [scales, *self._parameters()]

    def _joined(self, scaled: Sequence[Tensor]) -> list[Tensor]:
        """Weight and bias of every user, one after the other, from those of every layer."""
        pairs = iter(zip(scaled[::2], scaled[1::2]))
        return [tensor for user in self._users for tensor in join([next(pairs) for _ in _layers(user)])]

    def _in_form(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Weight and bias of every user in the form of its layers, in few launches."""
        forms = [_layers(user)[0].form for user in self._users for _ in range(2)]
        result = list(tensors)
        for form in dict.fromkeys(forms):
            places = [place for place, own in enumerate(forms) if own == form]
            for place, tensor in zip(places, form.of([tensors[place] for place in places])):
                result[place] = tensor
        return result

    def _gradients_needed(self, affines: Sequence[StepAffines]) -> list[bool]:
        needed = []
        for user in self._users:
            needed += [any(layer.weight.requires_grad for layer in _layers(user)),
                       any(layer.bias.requires_grad for layer in _layers(user))]
        for module in affines:
            of_map = module.log_scale.requires_grad or module.matrix.requires_grad
            needed += [of_map, module.log_scale.requires_grad or module.bias.requires_grad, of_map]
        return needed

    def _parameters(self) -> list[Tensor]:
        # Not layer.weight and layer.bias, which search: before every pass that is a millisecond.
        return [parameter for layer in self._layers for parameter in layer._parameters.values()]

    def _install(self, tensors: Sequence[Tensor], affines: Sequence[StepAffines]) -> None:
        values = iter(tensors)
        for user in self._users:
            user.__dict__["effective"] = next(values), next(values)
        for module in affines:
            module.__dict__["folded"] = FoldedAffines(next(values), next(values), next(values))

    def _remove(self) -> None:
        for user in self._users:
            user.__dict__.pop("effective", None)
        for module in self.affines:
            module.__dict__.pop("folded", None)


def _widened(gradients: list[Tensor]) -> list[Tensor]:
    """In float32 where they are narrower, all of them in a few launches."""
    narrow = [index for index, gradient in enumerate(gradients) if gradient.dtype in (torch.bfloat16, torch.float16)]
    copies = [torch.empty_like(gradients[index], dtype=torch.float32) for index in narrow]
    if copies:
        torch._foreach_copy_(copies, [gradients[index] for index in narrow])
    for index, copy in zip(narrow, copies):
        gradients[index] = copy
    return gradients


def _layers(user: Equalized | Together) -> Sequence[Equalized]:
    return user.layers if isinstance(user, Together) else (user,)


class _Scale(torch.autograd.Function):
    """Tensors times numbers, all in a few launches, forward and backward."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scales = scales
        return _scaled(scales, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [index for index, gradient in enumerate(gradients) if gradient is not None]
        scaled = _scaled([ctx.scales[index] for index in present], *(gradients[index] for index in present))
        result: list[Tensor | None] = [None] * len(gradients)
        for index, gradient in zip(present, scaled):
            result[index] = gradient
        return None, *result


def _scaled(scales: list[float], *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch._foreach_mul(tensors, scales))
