"""Caching of what is computed from parameters alone, safe across every way of changing them."""

from __future__ import annotations

from typing import Any, Callable, Hashable, Sequence, TypeVar

import torch
from torch import Tensor

__all__ = ["ParameterCache"]

T = TypeVar("T")


class ParameterCache:
    """Remembers results between calls while gradients are off and the parameters are unchanged.

    A result is keyed on each parameter's identity, storage, version, dtype and device, so an optimizer step,
    ``load_state_dict``, ``.to()`` and an EMA copy each make it stale. With gradients on, under ``torch.compile`` or
    with inference tensors (which have no version), nothing is remembered. Writing through ``parameter.data`` in place
    leaves no trace in the version: use ``torch.no_grad()`` instead.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[tuple[Any, ...], list[Tensor], Any]] = {}

    def get(self, name: Hashable, parameters: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """``compute()``, or what it returned last time for these ``parameters``."""
        if (torch.is_grad_enabled() or torch.compiler.is_compiling()
                or any(parameter.is_inference() for parameter in parameters)):
            return compute()
        key = tuple((parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device)
                    for parameter in parameters)
        entry = self._entries.get(name)
        if entry is None or entry[0] != key:
            # The aliases keep the storage alive, so that no later one can take its address.
            entry = key, [parameter.detach() for parameter in parameters], compute()
            self._entries[name] = entry
        return entry[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> ParameterCache:
        return ParameterCache()

    def __getstate__(self) -> dict[str, Any]:
        return {"_entries": {}}
