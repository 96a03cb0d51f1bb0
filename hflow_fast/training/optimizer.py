"""Adam with one parameter group per role, and its learning-rate schedule as a function of the epoch."""

from __future__ import annotations

import math
from typing import Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import GeneralConfig

__all__ = ["build_optimizer", "clip_and_step", "learning_rates", "set_epoch"]


def build_optimizer(groups: Mapping[str, Sequence[nn.Parameter]], config: GeneralConfig) -> torch.optim.Adam:
    """Adam (β 0.9, 0.999) over ``groups`` ("encoders", "flows", "decoders"), at the rates of epoch 0.

    It is the fused implementation: the only one that can skip a step without asking the device for the reason.
    """
    rates = learning_rates(0, config)
    return torch.optim.Adam(
        [{"params": list(parameters), "lr": rates[role], "role": role} for role, parameters in groups.items()],
        betas=(0.9, 0.999), fused=True,
    )


def learning_rates(epoch: int, config: GeneralConfig) -> dict[str, float]:
    """The learning rate of each group in ``epoch`` (counted from 0).

    The rates are multiplied by the decay once for each even epoch in (LEARNING_RATE_DECAY_START, epoch], as in
    HFlow (TMLR 2023); the encoders' is zero from LEARNING_RATE_CUT_ENCODERS on.
    """
    start = config.learning_rate_decay_start
    decays = max(epoch // 2 - start // 2, 0)
    frozen = epoch >= config.learning_rate_cut_encoders
    return {
        "encoders": 0.0 if frozen else config.learning_rate_encoders * config.learning_rate_decay_encoders**decays,
        "flows": config.learning_rate * config.learning_rate_decay**decays,
        "decoders": config.learning_rate_decoders * config.learning_rate_decay**decays,
    }


def set_epoch(optimizer: torch.optim.Adam, epoch: int, config: GeneralConfig) -> dict[str, float]:
    """Sets the rates of ``epoch`` and returns them. A group with rate zero is frozen: it gets no gradients any more."""
    rates = learning_rates(epoch, config)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["role"]]
        if group["lr"] == 0.0:
            for parameter in group["params"]:
                parameter.requires_grad_(False)
                parameter.grad = None
    return rates


def clip_and_step(optimizer: torch.optim.Adam, loss: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Clips the gradients to ``max_norm``, takes one step and clears them. Nothing here waits for the device.

    Args:
        optimizer: of :func:`build_optimizer`, its parameters holding gradients.
        loss: scalar; beside the gradients it decides whether the step is taken.
        max_norm: largest 2-norm of all gradients together; 0 or less: no limit.

    Returns:
        The gradients' norm before clipping, and whether the step was skipped because the loss or the norm is not
        finite (then parameters and moments are unchanged); both 0-dimensional tensors on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
    skipped = ~(torch.isfinite(norm) & torch.isfinite(loss.detach()))
    optimizer.found_inf = skipped.float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
