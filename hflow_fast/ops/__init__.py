"""The fused operations: differentiable functions on tensors, one module each.

Each runs a compiled kernel where there is one for the tensor's device and :mod:`hflow_fast.reference` elsewhere.
"""

from __future__ import annotations

from hflow_fast.ops.actnorm import actnorm

__all__ = ["actnorm"]
