"""Adamax with Adam's bias correction, as Glow is trained with."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Adamax"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Adamax(torch.optim.Optimizer):
    r"""Adam with the largest gradient so far, decayed, in the place of the root mean square.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        u_t = \max(\beta_2 u_{t-1}, |g_t|), \quad
        w_t = w_{t-1} - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{m_t}{u_t + \epsilon}

    :class:`torch.optim.Adamax` follows the paper, where the correction is :math:`1 / (1 - \beta_1^t)` alone: its first
    steps are :math:`1 / \sqrt{1 - \beta_2}` times as long as these, thirty times for :math:`\beta_2` = 0.999.

    A step is a handful of launches for all parameters of one dtype, whatever their number. It never waits for the
    device and can be captured in a CUDA graph: the number of steps is a tensor, and the rate may be one, a float64 or
    float32 scalar on the parameters' device, which later replays then follow.

    Sources: Kingma & Ba, "Adam: a method for stochastic optimization", 2015, section 7.1; the correction: Kingma &
    Dhariwal, "Glow: generative flow with invertible 1×1 convolutions", 2018, in its code.

    Args:
        params: parameters or groups of them, as any optimizer of PyTorch takes them; each group on one device.
        lr: η ≥ 0, a number or a tensor.
        betas: β₁ and β₂, both in [0, 1).
        eps: ε > 0.

    Raises:
        ValueError: a setting outside its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = Adamax([weight], lr=0.1, betas=(0.9, 0.0))
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.9000])
    """

    found_inf: Tensor | None = None
    """0-dimensional, on the device: where it is not 0, :meth:`step` changes nothing. The same name and meaning as in
    PyTorch's fused optimizers."""

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"Adamax: lr must be at least 0, got {lr}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Adamax: betas must be in [0, 1), got {betas}.")
        if not eps > 0:
            raise ValueError(f"Adamax: eps must be positive, got {eps}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; the group counts its own steps."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("step", torch.zeros((), device=_device(group)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, from any device."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update((name, group[name].to(_device(group))) for name in ("step", "lr")
                         if isinstance(group[name], Tensor))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step, of the parameters that have gradients. Where :attr:`found_inf` says so, the gradients become zero
        instead of the parameters moving.

        Args:
            closure: computes the loss anew and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_dtype: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_dtype[parameter.dtype].append(parameter)
            if by_dtype:
                self._step(group, by_dtype)
        return loss

    def _step(self, group: dict[str, Any], by_dtype: dict[torch.dtype, list[nn.Parameter]]) -> None:
        first, second = group["betas"]
        taken = torch.ones_like(group["step"]) if self.found_inf is None else (self.found_inf == 0).to(group["step"])
        group["step"] += taken
        count = group["step"].double().clamp_min(1.0)  # 0 where the very first step is skipped
        factor = group["lr"] * (1 - second**count).sqrt() / (1 - first**count) * taken
        # A step that is skipped goes through the same launches, with decays of 1 and gradients of 0. It is exact:
        # β + (1 − β) is 1 in floating point, too.
        decays = [beta + (1 - beta) * (1 - taken.double()) for beta in (first, second)]
        for parameters in by_dtype.values():
            self._update(parameters, group, taken, decays, factor)

    def _update(
        self, parameters: Sequence[nn.Parameter], group: dict[str, Any], taken: Tensor, decays: Sequence[Tensor],
        factor: Tensor,
    ) -> None:
        gradients = [parameter.grad for parameter in parameters]
        means, largest = ([self._moment(parameter, name) for parameter in parameters]
                          for name in ("exp_avg", "exp_inf"))
        dtype = parameters[0].dtype
        if self.found_inf is not None:
            # As integers: NaN times 0 would be NaN.
            bits = [gradient.view(_BITS[gradient.itemsize]) for gradient in gradients]
            torch._foreach_mul_(bits, taken.to(bits[0].dtype))
        torch._foreach_mul_(means, decays[0].to(dtype))
        torch._foreach_add_(means, gradients, alpha=1 - group["betas"][0])
        torch._foreach_mul_(largest, decays[1].to(dtype))
        torch._foreach_maximum_(largest, torch._foreach_abs(gradients))
        changes = torch._foreach_add(largest, group["eps"])
        torch._foreach_reciprocal_(changes)
        torch._foreach_mul_(changes, means)
        torch._foreach_mul_(changes, factor.to(dtype))
        torch._foreach_sub_(parameters, changes)

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]


def _device(group: dict[str, Any]) -> torch.device:
    return group["params"][0].device if group["params"] else torch.device("cpu")
