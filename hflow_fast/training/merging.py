"""How many passes of a step are run as one where the configuration leaves that to the trainer."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from .._allocator import free_bytes
from ..bench.memory import SavedBytes

__all__ = ["passes_that_fit"]

# A GPU belongs to its training; a computer's memory does not.
_SHARE_OF_FREE = {"cuda": 0.8, "cpu": 0.5}
# The peak of a pass over what its graph keeps: benchmarks/memory.py found 0.9 for stored activations, 2.5 for recomputed.
_PEAK_OVER_KEPT = {"store": 1.2, "recompute": 3.0}


def passes_that_fit(forward: Callable[[], Tensor], memory: str, device: torch.device) -> int:
    """How many passes a part of the free memory has room for, at least 1: 0.8 of a GPU's, 0.5 of a CPU's.

    A step is quickest in as few passes as possible: convolutions read their weights once for all images, and each
    launch does more.

    Args:
        forward: runs one pass forward, with gradients, and returns what it computes; run once.
        memory: "store" or "recompute", as GENERAL.MEMORY.
        device: of the pass.
    """
    left = free_bytes(device)
    if left is None:
        return 1
    with SavedBytes() as kept:
        result = forward()
    pass_bytes = _PEAK_OVER_KEPT[memory] * kept.total
    del result
    return max(1, int(_SHARE_OF_FREE[device.type] * left / max(pass_bytes, 1)))
