"""The fused operations: differentiable functions on tensors, one module each.

Each runs a compiled kernel where there is one for the tensor's device and :mod:`hflow_fast.reference` elsewhere.
"""

from __future__ import annotations

from hflow_fast.ops.actnorm import actnorm
from hflow_fast.ops.bias_act import bias_act
from hflow_fast.ops.conv1x1 import conv1x1
from hflow_fast.ops.coupling import CouplingSpec, active_mask, coupling
from hflow_fast.ops.flow_step import flow_step
from hflow_fast.ops.haar import haar
from hflow_fast.ops.instance_norm import instance_norm
from hflow_fast.ops.lu import lu, lu_many
from hflow_fast.ops.resample import resample

__all__ = [
    "CouplingSpec",
    "active_mask",
    "actnorm",
    "bias_act",
    "conv1x1",
    "coupling",
    "flow_step",
    "haar",
    "instance_norm",
    "lu",
    "lu_many",
    "resample",
]
