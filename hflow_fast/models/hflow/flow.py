"""The conditional flow of one level, and of one partition of the endblock."""

from __future__ import annotations

from typing import Iterable

import torch
from torch import Tensor, nn

from ...ops import CouplingSpec, actnorm, conv1x1, coupling, flow_step
from .affines import StepAffines
from .architecture import SCALE_CLAMP

__all__ = ["ConditionalFlow"]

DENSE_AFFINE = CouplingSpec(scale_map="exp_clip", clamp=SCALE_CLAMP, active="all")
"""The maps at both ends, whose parameters a decoder predicts for every pixel."""


class ConditionalFlow(nn.Module):
    """[dense affine →] L × (actnorm → coupling → 1 × 1 convolution) [→ dense affine], from image to latent.

    Each coupling, and each dense affine, runs in one pass with the channel map that follows it.

    Args:
        specs: what each coupling transforms, from image to latent.
        networks: its network, ``(x, context) → raw`` of twice the channels.
        affines: the channel maps between them.
    """

    def __init__(self, specs: Iterable[CouplingSpec], networks: Iterable[nn.Module], affines: StepAffines) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.networks = nn.ModuleList(networks)
        self.affines = affines

    def forward(self, x: Tensor, context: Tensor | None, start: Tensor | None = None,
                end: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → latent.

        Args:
            x: (B, C, H, W).
            context: (B, K, H, W), or None for networks without one.
            start, end: raw parameters (B, 2C, H, W) of the dense affine maps, both or neither.

        Returns:
            z (B, C, H, W) and log|det ∂z/∂x| (B,).
        """
        if self.training and not self.affines.is_initialized:
            self._initialize(x, context, start)
        maps = self.affines.to_latent()
        x, log_det = _affine_then_map(x, start, maps.weights[0], maps.biases[0], inverse=True)
        for index, network in enumerate(self.networks):
            x, term = flow_step(x, network(x, context), maps.weights[index + 1], maps.biases[index + 1],
                                self.specs[index], inverse=True)
            log_det = log_det + term
        if end is not None:
            x, term = coupling(x, end, DENSE_AFFINE, inverse=True)
            log_det = log_det + term
        return x, log_det + maps.log_det * _pixels(x)

    def inverse(self, z: Tensor, context: Tensor | None, start: Tensor | None = None,
                end: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent → data; arguments as :meth:`forward`. Returns x and log|det ∂x/∂z|."""
        maps = self.affines.to_data()
        x, log_det = _affine_then_map(z, end, maps.weights[0], maps.biases[0], inverse=False)
        for place, index in enumerate(reversed(range(len(self.networks))), start=1):
            x, term = flow_step(x, self.networks[index](x, context), maps.weights[place], maps.biases[place],
                                self.specs[index])
            log_det = log_det + term
        if start is not None:
            x, term = coupling(x, start, DENSE_AFFINE)
            log_det = log_det + term
        return x, log_det + maps.log_det * _pixels(x)

    @torch.no_grad()
    def _initialize(self, x: Tensor, context: Tensor | None, start: Tensor | None) -> None:
        """Walks the chain once, setting each actnorm from the data that reaches it."""
        if start is not None:
            x, _ = coupling(x, start, DENSE_AFFINE, inverse=True)
        affines, matrices = self.affines, self.affines.matrices()
        for index, network in enumerate(self.networks):
            affines.initialize_step(index, x)
            x, _ = actnorm(x, affines.log_scale[index], affines.bias[index], inverse=True)
            x, _ = coupling(x, network(x, context), self.specs[index], inverse=True)
            x = conv1x1(x, matrices[index])
        self.affines.finish_initialization()


def _affine_then_map(x: Tensor, raw: Tensor | None, weight: Tensor, bias: Tensor, *,
                     inverse: bool) -> tuple[Tensor, Tensor]:
    if raw is None:
        return conv1x1(x, weight, bias), x.new_zeros(x.shape[0])
    return flow_step(x, raw, weight, bias, DENSE_AFFINE, inverse=inverse)


def _pixels(x: Tensor) -> int:
    return x.shape[-2] * x.shape[-1]
