"""What is tested: a layer or a pair of functions, on one seed's weights and data, in any dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .weights import preserved, randomize

__all__ = ["Direction", "Subject"]

Direction = Callable[..., tuple[Tensor, Tensor]]


class Subject:
    """Both directions of a flow, the module that holds its weights, and one seed's data.

    Args:
        layer: ``z, log_det = layer(x)`` with ``layer.inverse``; a pair of such functions; or a forward one alone.
        module: Whose weights are randomized; the layer itself where it is a module.
        shape, x, context, dtype: As of the assertions.
        seed: Of weights and data.
    """

    def __init__(self, layer: Any, module: nn.Module | None, shape: Sequence[int], x: Tensor | None,
                 context: Tensor | None, dtype: torch.dtype, seed: int) -> None:
        self.seed, self.hint = seed, f"seed {seed}, {dtype}"
        self.forward, self._inverse = layer if isinstance(layer, tuple) else (layer, getattr(layer, "inverse", None))
        self.module = module or (layer if isinstance(layer, nn.Module) else nn.Module())
        weights = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
        device = torch.device("cpu") if weights is None else weights.device
        if x is None:
            x = torch.randn(tuple(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        elif tuple(x.shape) != tuple(shape):
            raise ValueError(f"hflow_fast.testing: x must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dim() < 2 or not x.numel():
            raise ValueError(f"hflow_fast.testing: shape must be (B, C, ...) and not empty, got {tuple(x.shape)}")
        self.x, self.context = _cast(x, dtype, device), None if context is None else _cast(context, dtype, device)

    @property
    def inverse(self) -> Direction:
        if self._inverse is None:
            raise ValueError("hflow_fast.testing: the layer has no inverse; give a pair (forward, inverse)")
        return self._inverse

    @contextmanager
    def prepared(self, randomized: bool) -> Iterator[None]:
        """The seed's weights, in the dtype of x, for the length of a ``with`` block; then everything as it was.

        Both directions run once before that, so that layers initialise from data and caches are filled: they have to
        notice the new weights.
        """
        with preserved(self.module):
            self.module.to(self.x.dtype)
            with torch.no_grad():
                z = self._first_call("layer(x)", self.forward, self.x)
                if self._inverse is not None:
                    self._first_call("inverse(z)", self._inverse, z)
            if not randomized:
                yield
                return
            with randomize(self.module, self.seed):
                yield

    @contextmanager
    def exact(self) -> Iterator[None]:
        """The same values in float64, for the length of a ``with`` block.

        Raises:
            ValueError: The layer does not run in float64.
        """
        x, context = self.x, self.context
        with preserved(self.module):
            self.module.to(torch.float64)
            self.x = _cast(x, torch.float64)
            self.context = None if context is None else _cast(context, torch.float64)
            try:
                yield
            except RuntimeError as error:
                raise ValueError("hflow_fast.testing: the layer has to run in float64 for this, and fails there: "
                                 f"{error}") from error
            finally:
                self.x, self.context = x, context

    def call(self, function: Direction, value: Tensor) -> tuple[Tensor, Tensor]:
        """``function(value)``, or ``function(value, context)`` where there is a context."""
        return function(value) if self.context is None else function(value, self.context)

    def _first_call(self, what: str, function: Direction, value: Tensor) -> Tensor:
        """The result of ``function(value)``, whose shapes and dtypes are checked."""
        result, log_det = self.call(function, value)
        if log_det.shape != value.shape[:1]:
            raise AssertionError(f"{what}: log_det must have shape {tuple(value.shape[:1])}, one value per sample, got "
                                 f"{tuple(log_det.shape)} ({self.hint})")
        if result.dtype != value.dtype:
            raise AssertionError(f"{what}: the result must have the dtype of its input, {value.dtype}, got "
                                 f"{result.dtype} ({self.hint})")
        coarsest = torch.promote_types(value.dtype, torch.float32)
        if torch.promote_types(log_det.dtype, coarsest) != log_det.dtype:
            raise AssertionError(f"{what}: log_det must be {coarsest} or finer, got {log_det.dtype} ({self.hint})")
        if result.shape[:1] != value.shape[:1] or result.numel() != value.numel():
            raise AssertionError(f"{what}: as many elements per sample must come out as went in, {tuple(value.shape)}, "
                                 f"got {tuple(result.shape)} ({self.hint})")
        return result


def _cast(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """In ``dtype`` where it is of a floating one; strides stay."""
    return tensor.detach().to(device, dtype if tensor.is_floating_point() else None)
