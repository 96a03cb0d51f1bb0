"""Chains of flow layers, and the fused flow step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import CouplingSpec, flow_step
from .actnorm import ActNorm
from .coupling import AffineCoupling
from .invconv import InvConv1x1, per_sample

__all__ = ["FlowStep", "Sequential"]


class Sequential(nn.Sequential):
    """Flow layers one after another; log-dets add up. ``inverse`` runs them backwards. ``context`` goes to each."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,)."""
        log_det = x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
        for layer in self:
            x, term = layer(x, context)
            log_det = log_det + term
        return x, log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,)."""
        log_det = z.new_zeros(z.shape[0], dtype=torch.promote_types(z.dtype, torch.float32))
        for layer in reversed(self):
            z, term = layer.inverse(z, context)
            log_det = log_det + term
        return z, log_det


class FlowStep(nn.Module):
    """Coupling → actnorm → 1 × 1 convolution, data to latent, in one read and one write of the flow variable.

    A chain of these behind one :class:`~.actnorm.ActNorm` and :class:`~.invconv.InvConv1x1` is Glow (whose step is
    written actnorm → 1 × 1 → coupling), with every pass between two networks fused.

    Args:
        channels: C.
        net, spec, swap_directions: as :class:`~.coupling.AffineCoupling`.
        parametrization: as :class:`~.invconv.InvConv1x1`.
    """

    def __init__(self, channels: int, net: nn.Module, spec: CouplingSpec = CouplingSpec(active="channels"),
                 swap_directions: bool = False, parametrization: str = "plu") -> None:
        super().__init__()
        self.coupling = AffineCoupling(net, spec, swap_directions)
        self.actnorm = ActNorm(channels)
        self.invconv = InvConv1x1(channels, parametrization)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, C, …) → latent and log|det| (B,)."""
        if self.training and not self.actnorm.is_initialized:
            with torch.no_grad():
                self.actnorm.initialize(self.coupling(x, context)[0])
        matrix, log_abs_det = self.invconv.matrix_and_log_det()
        scale = torch.exp(-self.actnorm.log_scale)
        # W·((x − b)·e^(−s)) as one matrix and one bias
        weight = matrix * scale
        z, log_det = flow_step(x, self.coupling.raw(x, context), weight, -(weight @ self.actnorm.bias.to(weight.dtype)),
                               self.coupling.spec, inverse=self.coupling.swap_directions)
        return z, log_det + per_sample(log_abs_det - self.actnorm.log_scale.sum(), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (B, C, …) → data and log|det| (B,)."""
        x, log_det = self.invconv.inverse(z)
        x, term = self.actnorm.inverse(x)
        log_det = log_det + term
        x, term = self.coupling.inverse(x, context)
        return x, log_det + term
