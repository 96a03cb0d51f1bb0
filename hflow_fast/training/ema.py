"""The moving average of a model's parameters, the model that is evaluated and sampled."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["update_average"]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, weight: float) -> None:
    """Moves ``average``'s parameters towards ``model``'s: average + weight · (model − average).

    Buffers (initialisation flags, fixed permutations) are states rather than estimates and are copied.

    Args:
        average: a copy of ``model``, changed in place.
        model: the model being trained.
        weight: in (0, 1]; 1 copies exactly.
    """
    targets, sources = list(average.parameters()), list(model.parameters())
    if weight == 1.0:
        torch._foreach_copy_(targets, sources)
    else:
        torch._foreach_lerp_(targets, sources, weight)
    for target, source in zip(average.buffers(), model.buffers(), strict=True):
        target.copy_(source)
