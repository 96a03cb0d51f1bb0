"""Less memory in training: parts of a model whose insides are computed again in the backward pass."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Recomputable", "set_recompute"]

T = TypeVar("T")


class Recomputable(nn.Module):
    """A module that runs parts of itself through :meth:`part`, and so can leave out what lies inside of them."""

    recompute = False
    """Whether parts are computed again in the backward pass; :func:`set_recompute` sets it."""

    def part(self, owner: nn.Module, function: Callable[..., T], *tensors: Any) -> T:
        """``function(*tensors)``; with :attr:`recompute`, nothing but the tensors is kept for the backward pass.

        Gradients are those of plain autograd, bit for bit where the kernels repeat themselves.

        Args:
            owner: the module whose parameters ``function`` uses.
            function: draws no random numbers, so that its second run is its first.

        Raises:
            RuntimeError: in the backward pass, where the parameters of ``owner`` changed after the forward pass, as by
                an optimizer's step: the second run would not be the first.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return function(*tensors)
        if torch.compiler.is_compiling():
            return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
        version = _version(owner)

        def run(*tensors: Any) -> T:
            if _version(owner) != version:
                raise RuntimeError(f"{type(owner).__name__}: parameters changed between the forward pass and its "
                                   "backward pass, which computes the activations again; take the optimizer's step "
                                   "after the backward pass, or turn this off with set_recompute(model, False).")
            return function(*tensors)

        return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)


def set_recompute(model: nn.Module, recompute: bool = True) -> None:
    """Lets ``model`` compute activations again in the backward pass instead of keeping them, or keep them.

    One more forward pass of compute, a fraction of the memory; the same losses and gradients. See ``docs/memory.md``.

    Example:
        >>> from hflow_fast.models import HFlow
        >>> model = HFlow.from_config("tiny-16")
        >>> set_recompute(model)
        >>> model.loss(torch.rand(2, 3, 16, 16) - 0.5).mean().backward()
    """
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recompute = recompute


def _version(module: nn.Module) -> int:
    """Of the first parameter: looking at all takes as long as a small part, and a step of an optimizer changes all."""
    return next(module.parameters())._version
