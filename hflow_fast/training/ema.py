"""The moving average of a model's parameters, the model that is evaluated and sampled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["update_average"]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, weight: float, skipped: Tensor | None = None) -> None:
    """Moves ``average``'s parameters towards ``model``'s: average + weight · (model − average).

    Buffers (initialisation flags, fixed permutations) are states rather than estimates and are copied.

    Args:
        average: a copy of ``model``, changed in place.
        model: the model being trained.
        weight: in (0, 1]; 1 copies exactly.
        skipped: 0-dimensional, on the device: true where the step that led here was not taken, so that ``model`` is
            what it was at the last call and the average stays, too. Nothing here waits for it.
    """
    targets, sources = list(average.parameters()), list(model.parameters())
    if weight == 1.0:
        torch._foreach_copy_(targets, sources)
    elif skipped is None:
        torch._foreach_lerp_(targets, sources, weight)
    else:
        change = torch._foreach_sub(sources, targets)
        torch._foreach_mul_(change, torch.where(skipped, 0.0, weight))
        torch._foreach_add_(targets, change)
    for target, source in zip(average.buffers(), model.buffers(), strict=True):
        target.copy_(source)
