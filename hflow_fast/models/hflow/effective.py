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
from .affines import FoldedAffines, StepAffines, fold_to_latent
from .layers import Equalized

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
        self._equalized = [module for module in model.modules() if isinstance(module, Equalized)]
        self._affines = [module for module in model.modules() if isinstance(module, StepAffines)]
        self._cache = ParameterCache()
        self._leaves: list[Tensor] | None = None
        self._sums: list[Tensor | None] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, all passes share effective weights and their gradients gather there; the end takes them back.

        Raises:
            RuntimeError: a parameter was changed inside, or the blocks are nested.
        """
        if self._leaves is not None:
            raise RuntimeError("HFlow.prepared: already inside such a block.")
        self._cache = ParameterCache()  # what was kept will not be asked for again
        affines = [module for module in self._affines if module.is_initialized]
        parameters = self._parameters(self._equalized) + [p for module in affines for p in module.parameters()]
        versions = [parameter._version for parameter in parameters]
        with torch.enable_grad():
            outputs = [*_Scale.apply(*self._scaling()), *(t for folded in fold_to_latent(affines) for t in folded)]
        leaves = [output.detach() for output in outputs]
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
        """Adds the gradients of the last pass to the sums, in few launches, where autograd would take one per tensor."""
        if torch.compiler.is_compiling() or self._leaves is None:
            return
        totals, gradients = [], []
        for index, leaf in enumerate(self._leaves):
            gradient = leaf.grad
            if gradient is None:
                continue
            leaf.grad = None
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
        parameters = self._parameters(self._equalized)
        self._install(self._cache.get("scaled", parameters, lambda: _scaled(*self._scaling())), ())
        try:
            yield
        finally:
            self._remove()

    def _scaling(self) -> list[Any]:
        scales = [scale for module in self._equalized for scale in (module.weight_scale, module.bias_scale)]
        return [scales, *self._parameters(self._equalized)]

    def _gradients_needed(self, affines: Sequence[StepAffines]) -> list[bool]:
        needed = [parameter.requires_grad for parameter in self._parameters(self._equalized)]
        for module in affines:
            of_map = module.log_scale.requires_grad or module.matrix.requires_grad
            needed += [of_map, module.log_scale.requires_grad or module.bias.requires_grad, of_map]
        return needed

    @staticmethod
    def _parameters(modules: Sequence[nn.Module]) -> list[Tensor]:
        return [parameter for module in modules for parameter in (module.weight, module.bias)]

    def _install(self, tensors: Sequence[Tensor], affines: Sequence[StepAffines]) -> None:
        values = iter(tensors)
        for module in self._equalized:
            module.__dict__["effective"] = next(values), next(values)
        for module in affines:
            module.__dict__["folded"] = FoldedAffines(next(values), next(values), next(values))

    def _remove(self) -> None:
        for module in self._equalized:
            module.__dict__.pop("effective", None)
        for module in self._affines:
            module.__dict__.pop("folded", None)


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
