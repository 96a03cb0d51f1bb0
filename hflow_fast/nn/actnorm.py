"""Activation normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import actnorm

__all__ = ["ActNorm"]

_SMALLEST_STD = 1e-6


class ActNorm(nn.Module):
    r"""Normalises every channel with learned statistics, initialised from the first training batch.

    .. math:: z_c = (x_c - b_c)\, e^{-s_c}

    Kingma & Dhariwal, "Glow", NeurIPS 2018, §3.1. The initialisation is remembered in a buffer, so that it survives
    saving and loading; in a process group all ranks initialise from their joint batch.

    Args:
        channels: C.
        data_init: False starts from the identity and never looks at data.

    Example:
        >>> layer = ActNorm(3)
        >>> z, log_det = layer(torch.randn(8, 3, 4, 4) * 2 + 1)
        >>> z.shape, log_det.shape
        (torch.Size([8, 3, 4, 4]), torch.Size([8]))
    """

    initialized: Tensor

    def __init__(self, channels: int, data_init: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(not data_init))
        self._known_initialized = not data_init

    @property
    def is_initialized(self) -> bool:
        """Whether the statistics are set; once they are, asking costs no device sync."""
        if not self._known_initialized:
            self._known_initialized = bool(self.initialized)
        return self._known_initialized

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, C, …) → latent and log|det| (B,). ``context`` is ignored."""
        if self.training and not self.is_initialized:
            self.initialize(x)
        return actnorm(x, self.log_scale, self.bias, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (B, C, …) → data and log|det| (B,). ``context`` is ignored."""
        return actnorm(z, self.log_scale, self.bias)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets the statistics so that ``x`` (B, C, …) maps to zero mean and unit (unbiased) standard deviation.

        Raises:
            ValueError: a channel has fewer than two values to take a standard deviation of.
        """
        values = x.detach().double().transpose(0, 1).flatten(1)
        count = torch.full_like(self.bias, values.shape[1], dtype=torch.float64)
        moments = torch.stack([count, values.sum(dim=1), values.square().sum(dim=1)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(moments)
        count, total, squares = moments
        if count[0] < 2:
            raise ValueError(f"ActNorm: x of shape {tuple(x.shape)} has fewer than two values per channel to initialise "
                             "from; give a larger first batch, or use data_init=False.")
        variance = (squares - total.square() / count) / (count - 1)
        self.bias.copy_(total / count)
        self.log_scale.copy_(variance.clamp_min(_SMALLEST_STD**2).log() / 2)
        self.initialized.fill_(True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initialized = False

    def extra_repr(self) -> str:
        return str(self.bias.numel())
