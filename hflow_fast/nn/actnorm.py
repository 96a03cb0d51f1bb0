"""Activation normalisation."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from ..ops import actnorm
from ._data_init import DataInitialized, channel_statistics
from ._folding import ChannelMap, stack
from ._fusion import LazyMap, Opaque, Piece

__all__ = ["ActNorm"]


class ActNorm(DataInitialized):
    r"""Normalises every channel with learned statistics, initialised from the first training batch.

    .. math:: z_c = (x_c - b_c)\, e^{-s_c}

    Kingma & Dhariwal, "Glow", NeurIPS 2018, §3.1. The initialisation is remembered in a buffer, so that it survives
    saving and loading; in a process group all ranks initialise from their joint batch, and all have to take part: see
    :func:`~hflow_fast.nn.initialize_locally`.

    Args:
        channels: C.
        data_init: False starts from the identity and never looks at data.

    Example:
        >>> layer = ActNorm(3)
        >>> z, log_det = layer(torch.randn(8, 3, 4, 4) * 2 + 1)
        >>> z.shape, log_det.shape
        (torch.Size([8, 3, 4, 4]), torch.Size([8]))
    """

    def __init__(self, channels: int, data_init: bool = True) -> None:
        super().__init__(data_init)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, C, …) → latent and log|det| (B,). ``context`` is ignored."""
        if self.training and not self.is_initialized:
            self.initialize(x)
        return actnorm(x, self.log_scale, self.bias, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (B, C, …) → data and log|det| (B,). ``context`` is ignored."""
        return actnorm(z, self.log_scale, self.bias)

    def pieces(self, inverse: bool, context: Tensor | None = None) -> list[Piece]:
        """What a direction evaluates, for chains that fuse it with its neighbours."""
        if self.training and not inverse and not self.is_initialized:
            return [Opaque(self.forward, self.inverse, self)]
        channels, dtype, device = self.bias.numel(), self.bias.dtype, self.bias.device
        return [LazyMap(self, _maps, ("actnorm", channels, dtype, device), channels, self._evaluate, True, inverse)]

    def _evaluate(self, inverse: bool, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(x) if inverse else self.forward(x)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets the statistics so that ``x`` (B, C, …) maps to zero mean and unit (unbiased) standard deviation.

        Raises:
            ValueError: a channel has fewer than two values to take a standard deviation of.
        """
        mean, log_std = channel_statistics(x)
        self.bias.copy_(mean)
        self.log_scale.copy_(log_std)
        self.finish_initialization()

    def extra_repr(self) -> str:
        return str(self.bias.numel())


def _maps(layers: Sequence[ActNorm]) -> ChannelMap:
    """Data to latent: a stack of diagonal maps."""
    log_scale, bias = stack([layer.log_scale for layer in layers]), stack([layer.bias for layer in layers])
    dtype = torch.promote_types(log_scale.dtype, torch.float32)
    log_scale, bias = log_scale.to(dtype), bias.to(dtype)
    scale = torch.exp(-log_scale)
    return ChannelMap(scale, -bias * scale, -log_scale.sum(-1))
