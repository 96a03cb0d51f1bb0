"""What layers compute from their parameters alone, computed once for many passes.

Parameters are not what convolutions and flows multiply by: activation norms are folded into the convolutions before
them, and into the matrices behind them, whose log-dets are taken. In training these are the same for all micro-batches
of an optimizer step, in sampling for ever.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ...nn._cache import ParameterCache
from ..precision import NetworkForm

__all__ = ["Folding", "shared"]


class Folding(nn.Module):
    """A module that is used in a folded form.

    =====================  ========================================================
    within :func:`shared`  folded once per block
    gradients off          folded once, until a parameter changes
    else                   folded in every pass
    =====================  ========================================================
    """

    form = NetworkForm()
    """Of what :meth:`in_form` returns; see :meth:`Glow.set_precision`."""
    given: tuple[Tensor, ...] | None = None
    """What :meth:`fold` returned, while :func:`shared` provides it."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = ParameterCache()

    def fold(self) -> tuple[Tensor, ...]:
        """The folded form, in the parameters' dtype."""
        raise NotImplementedError

    def in_form(self, folded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """It, as it is used: flows take it as it is."""
        return folded

    def folded(self) -> tuple[Tensor, ...]:
        """The folded form, as it is used."""
        if self.given is not None:
            return self.in_form(self.given)
        return self._cache.get("folded", list(self.parameters()), lambda: self.in_form(self.fold()))

    def take_form(self, form: NetworkForm) -> None:
        """From now on :meth:`folded` is in this form."""
        self.form = form
        self._cache = ParameterCache()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "given"}


@contextmanager
def shared(model: nn.Module) -> Iterator[None]:
    """Inside, all passes share what is folded, and their gradients gather there; the end takes them back.

    Raises:
        RuntimeError: a parameter was changed inside, or the blocks are nested.
    """
    modules = [module for module in model.modules() if isinstance(module, Folding)]
    if any(module.given is not None for module in modules):
        raise RuntimeError("Glow.prepared: already inside such a block.")
    parameters = [parameter for module in modules for parameter in module.parameters()]
    versions = [parameter._version for parameter in parameters]
    with torch.enable_grad():
        folded = [module.fold() for module in modules]
    leaves = [tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors) for tensors in folded]
    for module, tensors in zip(modules, leaves):
        module.given = tensors
    try:
        yield
    finally:
        for module in modules:
            del module.given
    if versions != [parameter._version for parameter in parameters]:
        raise RuntimeError("Glow.prepared: parameters changed inside the block, whose passes did not see it; take the "
                           "optimizer's step after it.")
    pairs = [(tensor, leaf.grad) for tensors, given in zip(folded, leaves) for tensor, leaf in zip(tensors, given)
             if leaf.grad is not None]
    if pairs:
        torch.autograd.backward(*zip(*pairs))
