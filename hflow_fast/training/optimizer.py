"""The optimizer, with one parameter group per role, and its learning rates as a function of epoch and warm-up."""

from __future__ import annotations

import math
from typing import Any, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .adamax import Adamax
from .config import GeneralConfig

__all__ = ["build_optimizer", "clip_and_step", "learning_rates", "restore", "set_epoch"]

Optimizer = torch.optim.Adam | Adamax

_ROLES = ("encoders", "flows", "decoders")


def build_optimizer(
    groups: Mapping[str, Sequence[nn.Parameter]], config: GeneralConfig, steps_per_epoch: int = 1000
) -> Optimizer:
    """The configuration's optimizer over ``groups``, at the rates of epoch 0.

    Both kinds can skip a step without asking the device for the reason: of PyTorch's Adam that is the fused
    implementation. Rates are tensors on the parameters' device, so that a step recorded in a CUDA graph follows them.

    Args:
        groups: parameters by role: "flows", and "encoders" and "decoders" where the model has them.
        config: which optimizer, and its rates.
        steps_per_epoch: what Glow's Adamax takes β₂ from.
    """
    roles = [{"params": list(parameters), "role": role} for role, parameters in groups.items()]
    optimizer = Adamax(roles) if config.optimizer == "adamax" else torch.optim.Adam(roles, fused=True)
    _own_settings(optimizer, config, steps_per_epoch)
    set_epoch(optimizer, 0, config)
    return optimizer


def restore(optimizer: Optimizer, state: dict[str, Any], config: GeneralConfig, steps_per_epoch: int) -> None:
    """Loads a ``state_dict`` of :func:`build_optimizer`'s result, of any device; rates are then to be set."""
    optimizer.load_state_dict(state)
    _own_settings(optimizer, config, steps_per_epoch)


def _own_settings(optimizer: Optimizer, config: GeneralConfig, steps_per_epoch: int) -> None:
    for group in optimizer.param_groups:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        group["betas"] = 0.9, _beta2(config, steps_per_epoch)
        if isinstance(optimizer, torch.optim.Adam):
            group["capturable"] = True
        # The fused Adam takes a rate in float32 from a GPU's memory, and in full from a processor's.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        group["lr"] = torch.zeros((), dtype=dtype, device=device)


def _beta2(config: GeneralConfig, steps_per_epoch: int) -> float:
    if config.beta2 is not None:
        return config.beta2
    return 0.999 if config.optimizer == "adam" else 1 - 1 / steps_per_epoch


def learning_rates(
    epoch: int, config: GeneralConfig, roles: Iterable[str] = _ROLES, warm_up: float = 1.0
) -> dict[str, float]:
    """The learning rate of each group in ``epoch`` (counted from 0).

    The rates are multiplied by the decay once for each even epoch in (LEARNING_RATE_DECAY_START, epoch], as in
    HFlow (TMLR 2023); the encoders' is zero from LEARNING_RATE_CUT_ENCODERS on.

    Args:
        roles: of the groups; one that is neither "encoders" nor "decoders" has LEARNING_RATE.
        warm_up: factor on all of them.
    """
    start, cut = config.learning_rate_decay_start, config.learning_rate_cut_encoders
    decays = max(epoch // 2 - start // 2, 0)
    own = {"encoders": config.learning_rate_encoders, "decoders": config.learning_rate_decoders}
    rates = {}
    for role in roles:
        rate, decay = own.get(role), config.learning_rate_decay
        if role == "encoders" and config.learning_rate_decay_encoders is not None:
            decay = config.learning_rate_decay_encoders
        rates[role] = (config.learning_rate if rate is None else rate) * decay**decays * warm_up
    if "encoders" in rates and cut is not None and epoch >= cut:
        rates["encoders"] = 0.0
    return rates


def set_epoch(optimizer: Optimizer, epoch: int, config: GeneralConfig, warm_up: float = 1.0) -> dict[str, float]:
    """Sets the rates of ``epoch``, times ``warm_up``, and returns them.

    A group whose rate is zero by itself is frozen: it gets no gradients any more.
    """
    roles = [group["role"] for group in optimizer.param_groups]
    rates, final = learning_rates(epoch, config, roles, warm_up), learning_rates(epoch, config, roles)
    for group in optimizer.param_groups:
        group["lr"].fill_(rates[group["role"]])
        if final[group["role"]] == 0.0:
            for parameter in group["params"]:
                parameter.requires_grad_(False)
                parameter.grad = None
    return rates


def clip_and_step(optimizer: Optimizer, loss: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
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
