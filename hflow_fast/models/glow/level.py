"""One level: squeeze, steps, and the split behind them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...nn._fusion import run
from ...nn.reshape import squeezed, unsqueezed
from ..precision import NetworkForm
from .config import GlowConfig
from .prior import SplitPrior
from .steps import FlowSteps

__all__ = ["Level"]


class Level(nn.Module):
    """From the flow variable (B, C/4, 2R, 2R) of the level before to this level's latent and what goes on.

    Args:
        channels: C, behind the squeeze.
        resolution: R, behind the squeeze.
        last: nothing goes on; the latent is all of z, for the last prior to normalise.
    """

    form = NetworkForm()

    def __init__(self, config: GlowConfig, channels: int, resolution: int, last: bool) -> None:
        super().__init__()
        self.resolution = resolution
        self.latent_shape = (channels if last else channels // 2, resolution, resolution)
        self.steps = FlowSteps(config, channels, resolution)
        self.prior = None if last else SplitPrior(channels, resolution, config.edge_bias)

    @property
    def name(self) -> str:
        """The resolution, as a key of the bound's terms."""
        return str(self.resolution)

    def take_form(self, form: NetworkForm) -> None:
        """From now on the flow variable is in this memory format."""
        self.form = form

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Data → latent, what goes on (B, C/2, R, R), and log|det| (B,)."""
        x = self.form.laid_out(squeezed(x, 2))
        if self.training and not self.steps.is_initialized:
            self.steps.initialize(x)
        pieces = self.steps.to_latent(x.dtype)
        if self.prior is None:
            z, log_det = run(pieces, x)
            return z, None, log_det
        z, log_det = run([*pieces, self.prior.coupling(inverse=True)], x)
        rest, latent = z.chunk(2, dim=1)
        return latent, rest, log_det

    def inverse(self, latent: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latent and what went on → data and log|det| (B,)."""
        pieces = self.steps.to_data(latent.dtype)
        if self.prior is not None:
            latent = torch.cat([rest, latent], dim=1)
            pieces = [self.prior.coupling(inverse=False), *pieces]
        x, log_det = run(pieces, self.form.laid_out(latent))
        return unsqueezed(x, 2), log_det
