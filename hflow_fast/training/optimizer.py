"""Adam with one parameter group per role, and its learning-rate schedule as a function of the epoch."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import GeneralConfig

__all__ = ["build_optimizer", "clip_and_step", "learning_rates", "restore", "set_epoch"]


def build_optimizer(groups: Mapping[str, Sequence[nn.Parameter]], config: GeneralConfig) -> torch.optim.Adam:
    """Adam (β 0.9, 0.999) over ``groups`` ("encoders", "flows", "decoders"), at the rates of epoch 0.

    It is the fused implementation: the only one that can skip a step without asking the device for the reason. Rates
    are tensors on the parameters' device, so that a step recorded in a CUDA graph follows them.
    """
    optimizer = torch.optim.Adam(
        [{"params": list(parameters), "role": role} for role, parameters in groups.items()],
        betas=(0.9, 0.999), fused=True,
    )
    _own_settings(optimizer)
    _set_rates(optimizer, learning_rates(0, config))
    return optimizer


def restore(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
    """Loads a ``state_dict`` of :func:`build_optimizer`'s result, of any device; rates are then to be set."""
    optimizer.load_state_dict(state)
    _own_settings(optimizer)


def _own_settings(optimizer: torch.optim.Adam) -> None:
    for group in optimizer.param_groups:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        group["capturable"] = True
        # Adam takes a rate in float32 from a GPU's memory, and in full from a processor's.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        group["lr"] = torch.zeros((), dtype=dtype, device=device)


def _set_rates(optimizer: torch.optim.Adam, rates: Mapping[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"].fill_(rates[group["role"]])


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
    _set_rates(optimizer, rates)
    for group in optimizer.param_groups:
        if rates[group["role"]] == 0.0:
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
