"""The steps of one level."""

from __future__ import annotations

from functools import partial
from typing import Iterator

import torch
from torch import Tensor

from ...nn._data_init import DataInitialized
from ...nn._fusion import ChannelMap, Coupling, Piece
from ...nn.recompute import Recomputable
from ...ops import CouplingSpec, conv1x1, coupling
from .affines import StepAffines
from .config import GlowConfig
from .network import LOGS_FACTOR, CouplingNetworks, coupling_network

__all__ = ["COUPLINGS", "FlowSteps"]

COUPLINGS = {
    "additive": CouplingSpec(scale_map="none", active="channels"),
    "affine": CouplingSpec(scale_map="sigmoid", layout="interleaved", shift_first=True, form="add_scale",
                           active="channels"),
}
"""z₂ = x₂ + shift, or (x₂ + shift)·σ(scale + 2); the network sees x₁."""


class FlowSteps(Recomputable, DataInitialized):
    """K × (actnorm → permutation → coupling) on C channels.

    Args:
        channels: C, even.
        resolution: height and width of the flow variable.
    """

    def __init__(self, config: GlowConfig, channels: int, resolution: int) -> None:
        super().__init__(data_init=True)
        self.spec = COUPLINGS[config.coupling]
        passive = channels // 2
        self.affines = StepAffines(config.steps, channels, config.permutation)
        self.networks = CouplingNetworks(config.steps, (passive, self.spec.raw_channels(passive)), config.width,
                                         resolution, config.edge_bias)

    def to_latent(self, dtype: torch.dtype) -> list[Piece]:
        """The steps from image to latent, for a flow variable of ``dtype`` in :func:`hflow_fast.nn._fusion.run`."""
        pairs = zip(_maps(*self.affines.folded(), dtype), self._couplings(inverse=False))
        return [piece for pair in pairs for piece in pair]

    def to_data(self, dtype: torch.dtype) -> list[Piece]:
        """The way back, for a latent of ``dtype``."""
        pairs = list(zip(self._couplings(inverse=True), _maps(*self.affines.to_data(dtype), dtype)))
        return [piece for pair in reversed(pairs) for piece in pair]

    def _couplings(self, inverse: bool) -> list[Coupling]:
        return [Coupling(partial(self._raw, weights), self.spec, inverse) for weights in self.networks.each()]

    def _raw(self, weights: tuple[Tensor | None, ...], x: Tensor) -> Tensor:
        return self.part(self.networks, _of_passive_half, x, *weights)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Walks the steps once, setting every activation norm from the data that reaches it."""
        matrices, _ = self.affines.matrices()
        for index, matrix in enumerate(matrices):
            self.affines.initialize_one(index, x)
            weight = matrix * torch.exp(LOGS_FACTOR * self.affines.logs[index])
            x = conv1x1(x, weight, (weight * self.affines.bias[index]).sum(dim=1))
            raw = self.networks.initialize_one(index, _passive_half(x))
            x, _ = coupling(x, raw, self.spec)
        self.finish_initialization()


def _maps(weights: Tensor, biases: Tensor, log_dets: Tensor, dtype: torch.dtype) -> Iterator[ChannelMap]:
    # Log-dets are added up in the dtype of the flow, so that those of both directions cancel in it.
    log_dets = log_dets.to(torch.promote_types(log_dets.dtype, dtype))
    return map(ChannelMap, weights.unbind(), biases.unbind(), log_dets.unbind())


def _of_passive_half(x: Tensor, *weights: Tensor | None) -> Tensor:
    return coupling_network(_passive_half(x), *weights)


def _passive_half(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]
