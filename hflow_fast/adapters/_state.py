"""What layers keep beside their parameters. A change of class makes no attributes, so it is made on first use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn._cache import ParameterCache

__all__ = ["cache_of", "is_set"]


class _Flags:
    """Remembers which tensors were true until they may have changed: asking a tensor stalls the device."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Tensor, int]] = {}

    def is_set(self, name: str, tensor: Tensor) -> bool:
        seen = self._seen.get(name)
        if torch.compiler.is_compiling() and seen is not None:  # a version is nothing to compile
            return True
        if torch.compiler.is_compiling() or tensor.is_inference():  # which has no version
            return bool(tensor)
        if seen is not None and seen[0] is tensor and seen[1] == tensor._version:
            return True
        found = bool(tensor)
        if found:
            self._seen[name] = tensor, tensor._version
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> _Flags:
        return _Flags()

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": {}}


def cache_of(layer: nn.Module) -> ParameterCache:
    """The cache of ``layer`` for what depends on its parameters alone."""
    return _lazily(layer, "_fused_cache", ParameterCache)


def is_set(layer: nn.Module, name: str, flag: Tensor | None = None) -> bool:
    """Whether the buffer ``name`` of ``layer``, such as "initialised", is true; or ``flag``, remembered as ``name``."""
    return _lazily(layer, "_fused_flags", _Flags).is_set(name, getattr(layer, name) if flag is None else flag)


def _lazily(layer: nn.Module, name: str, kind: type) -> Any:
    found = vars(layer).get(name)
    if found is None:
        found = vars(layer)[name] = kind()
    return found
