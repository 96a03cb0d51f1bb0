"""The conditional flow of one level, and of one partition of the endblock."""

from __future__ import annotations

from typing import Callable, Iterable

import torch
from torch import Tensor, nn

from ...nn.recompute import Recomputable
from ...ops import CouplingSpec, actnorm, conv1x1, coupling, flow_step
from .affines import StepAffines
from .architecture import SCALE_CLAMP
from .coupling_nets import ContextEmbeddings

__all__ = ["ConditionalFlow"]

DENSE_AFFINE = CouplingSpec(scale_map="exp_clip", clamp=SCALE_CLAMP, active="all")
"""The maps at both ends, whose parameters a decoder predicts for every pixel."""


class ConditionalFlow(Recomputable):
    """[dense affine →] L × (actnorm → coupling → 1 × 1 convolution) [→ dense affine], from image to latent.

    Each coupling, and each dense affine, runs in one pass with the channel map that follows it.

    Args:
        specs: what each coupling transforms, from image to latent.
        networks: its network, ``(x, embedded context) → raw`` of twice the channels; see
            :class:`~.coupling_nets.ContextEmbeddings`.
        affines: the channel maps between them.
    """

    def __init__(self, specs: Iterable[CouplingSpec], networks: Iterable[nn.Module], affines: StepAffines) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.networks = nn.ModuleList(networks)
        self.affines = affines
        self._embed = ContextEmbeddings(self.networks)
        self.together = [layers for _, layers in self._embed.groups.values()]

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
        contexts = self._embed(context)
        # Split at once, so that the gradients of all steps are put together in one pass.
        (weight, *weights), (bias, *biases) = maps.weights.unbind(), maps.biases.unbind()
        x, terms = _affine_then_map(x, start, weight, bias, inverse=True)
        for network, spec, own_context, weight, bias in zip(self.networks, self.specs, contexts, weights, biases):
            x, term = self.part(network, _step_of(network, spec), x, own_context, weight, bias)
            terms.append(term)
        if end is not None:
            x, term = coupling(x, end, DENSE_AFFINE, inverse=True)
            terms.append(term)
        return x, _sum(terms, maps.log_det, x)

    def inverse(self, z: Tensor, context: Tensor | None, start: Tensor | None = None,
                end: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent → data; arguments as :meth:`forward`. Returns x and log|det ∂x/∂z|."""
        maps = self.affines.to_data(z.dtype)
        contexts = self._embed(context)
        (weight, *weights), (bias, *biases) = maps.weights.unbind(), maps.biases.unbind()
        x, terms = _affine_then_map(z, end, weight, bias, inverse=False)
        steps = reversed(list(zip(self.networks, self.specs, contexts)))
        for (network, spec, own_context), weight, bias in zip(steps, weights, biases):
            x, term = flow_step(x, network(x, own_context), weight, bias, spec)
            terms.append(term)
        if start is not None:
            x, term = coupling(x, start, DENSE_AFFINE)
            terms.append(term)
        return x, _sum(terms, maps.log_det, x)

    @torch.no_grad()
    def _initialize(self, x: Tensor, context: Tensor | None, start: Tensor | None) -> None:
        """Walks the chain once, setting each actnorm from the data that reaches it."""
        if start is not None:
            x, _ = coupling(x, start, DENSE_AFFINE, inverse=True)
        affines, matrices, contexts = self.affines, self.affines.matrices(), self._embed(context)
        for index, network in enumerate(self.networks):
            affines.initialize_step(index, x)
            x, _ = actnorm(x, affines.log_scale[index], affines.bias[index], inverse=True)
            x, _ = coupling(x, network(x, contexts[index]), self.specs[index], inverse=True)
            x = conv1x1(x, matrices[index])
        self.affines.finish_initialization()


def _affine_then_map(x: Tensor, raw: Tensor | None, weight: Tensor, bias: Tensor, *,
                     inverse: bool) -> tuple[Tensor, list[Tensor]]:
    """The result and, if there is a dense affine map, its log-det, to which a chain's are added."""
    if raw is None:
        return conv1x1(x, weight, bias), []
    x, log_det = flow_step(x, raw, weight, bias, DENSE_AFFINE, inverse=inverse)
    return x, [log_det]


def _step_of(network: nn.Module, spec: CouplingSpec) -> Callable[..., tuple[Tensor, Tensor]]:
    """A step to the latent, with the channel map that follows it."""
    def step(x: Tensor, context: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return flow_step(x, network(x, context), weight, bias, spec, inverse=True)
    return step


def _sum(terms: list[Tensor], per_pixel: Tensor, x: Tensor) -> Tensor:
    """The log-dets of the couplings, (B,) each, and that of the channel maps for every pixel."""
    return torch.stack(terms).sum(dim=0) + per_pixel * (x.shape[-2] * x.shape[-1])
