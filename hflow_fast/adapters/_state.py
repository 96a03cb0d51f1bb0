"""What layers keep beside their parameters. A change of class makes no attributes, so it is made on first use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn._cache import ParameterCache

__all__ = ["cache_of", "is_set"]


class _Flag:
    """Remembers that a tensor was true until it may have changed: asking a tensor stalls the device."""

    def __init__(self) -> None:
        self._seen: tuple[Tensor, int] | None = None

    def is_set(self, tensor: Tensor) -> bool:
        if tensor.is_inference():  # which has no version
            return bool(tensor)
        if self._seen is not None and self._seen[0] is tensor and self._seen[1] == tensor._version:
            return True
        found = bool(tensor)
        self._seen = (tensor, tensor._version) if found else None
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> _Flag:
        return _Flag()

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}


def cache_of(layer: nn.Module) -> ParameterCache:
    """The cache of ``layer`` for what depends on its parameters alone."""
    return _lazily(layer, "_fused_cache", ParameterCache)


def is_set(layer: nn.Module, name: str) -> bool:
    """Whether the buffer ``name`` of ``layer``, such as "is initialised", is true."""
    return _lazily(layer, "_fused_flag", _Flag).is_set(getattr(layer, name))


def _lazily(layer: nn.Module, name: str, kind: type) -> Any:
    found = vars(layer).get(name)
    if found is None:
        found = vars(layer)[name] = kind()
    return found
