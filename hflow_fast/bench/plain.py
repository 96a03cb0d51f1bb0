"""Every operation as plain torch has it: the reference, and torch's own functions where those are faster."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import actnorm, bias_act, conv1x1, coupling, flow_step, haar, lu, lu_many

__all__ = [
    "actnorm", "bias_act", "conv1x1", "coupling", "flow_step", "haar", "instance_norm", "lu", "lu_many", "resample",
]  # fmt: skip


def instance_norm(x: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Torch's norm has the biased variance: the factor between the two moves into epsilon and outside."""
    count = math.prod(x.shape[2:])
    ratio = (count - 1) / count
    return F.instance_norm(x, eps=epsilon * ratio) * math.sqrt(ratio)


def resample(x: Tensor, *, up: bool = False) -> Tensor:
    """Down a depthwise convolution; up an interpolation, with the one reflected row and column it lacks."""
    if up:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, 1, 0, 1), mode="reflect")
        return F.interpolate(padded, scale_factor=2.0, mode="bilinear")[..., : 2 * height, : 2 * width]
    taps = torch.tensor([0.125, 0.375, 0.375, 0.125], dtype=x.dtype, device=x.device)
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=x.shape[1])
