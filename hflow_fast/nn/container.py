"""Chains of flow layers, and the fused flow step."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from ..ops import CouplingSpec, conv1x1, flow_step
from ._cache import ParameterCache
from ._inversion import invert
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
    written actnorm → 1 × 1 → coupling), with every pass between two networks fused. The inverse undoes the actnorm and
    the convolution by one matrix, too: the inverse, in float64, of the very matrix that the forward direction applies.

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
        self._cache = ParameterCache()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, C, …) → latent and log|det| (B,)."""
        if self.training and not self.actnorm.is_initialized:
            with torch.no_grad():
                self.actnorm.initialize(self.coupling(x, context)[0])
        weight, bias, log_abs_det = self._cached("latent", self._to_latent)
        z, log_det = flow_step(x, self.coupling.raw(x, context), weight, bias, self.coupling.spec,
                               inverse=self.coupling.swap_directions)
        return z, log_det + per_sample(log_abs_det, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (B, C, …) → data and log|det| (B,)."""
        weight, bias, log_abs_det = self._cached("data", self._to_data)
        x, log_det = self.coupling.inverse(conv1x1(z, weight, bias), context)
        return x, log_det + per_sample(log_abs_det, z)

    def _cached(self, name: str, compute: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        return self._cache.get(name, [*self.actnorm.parameters(), *self.invconv.parameters()], compute)

    def _to_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """W·((x − b)·e^(−s)) as one matrix and one bias, and its log|det|."""
        matrix, log_abs_det = self.invconv.matrix_and_log_det()
        weight = matrix * torch.exp(-self.actnorm.log_scale)
        return weight, -(weight @ self.actnorm.bias.to(weight.dtype)), log_abs_det - self.actnorm.log_scale.sum()

    def _to_data(self) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of that."""
        weight, _, log_abs_det = self._cached("latent", self._to_latent)
        inverse = invert(weight, "FlowStep").to(torch.promote_types(weight.dtype, torch.float32))
        return inverse, self.actnorm.bias, -log_abs_det
