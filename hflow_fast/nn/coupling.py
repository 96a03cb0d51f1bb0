"""The affine coupling layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import CouplingSpec, active_mask, coupling
from ._fusion import Coupling, Piece

__all__ = ["AffineCoupling"]


class AffineCoupling(nn.Module):
    """Transforms one part of the channels or pixels, elementwise, as a network of the other part says.

    Dinh et al., "Density estimation using Real NVP", ICLR 2017. The coupling and its log-det run in one kernel.

    Args:
        net: ``net(passive)``, or ``net(passive, context)`` where a context is given, → raw parameters as ``spec``
            describes them. With channel splits it sees the passive channels only; with checkerboards, rows and columns
            all of x with the active part zeroed; with ``active="all"`` there is no passive part: it sees the context.
        spec: which part is active and how raw parameters become scale and shift.
        swap_directions: data → latent evaluates the inverse of the spec's form (as HFlow does).

    Example:
        >>> layer = AffineCoupling(nn.Conv2d(2, 4, 3, padding=1), CouplingSpec(scale_map="sigmoid", active="channels"))
        >>> x = torch.randn(2, 4, 8, 8)
        >>> z, log_det = layer(x)
        >>> torch.allclose(layer.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, net: nn.Module, spec: CouplingSpec = CouplingSpec(active="channels"),
                 swap_directions: bool = False) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.swap_directions = swap_directions

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, C, …) → latent and log|det| (B,)."""
        return coupling(x, self.raw(x, context), self.spec, inverse=self.swap_directions)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (B, C, …) → data and log|det| (B,)."""
        return coupling(z, self.raw(z, context), self.spec, inverse=not self.swap_directions)

    def pieces(self, inverse: bool, context: Tensor | None = None) -> list[Piece]:
        """What a direction evaluates, for chains that fuse it with its neighbours."""
        return [Coupling(lambda x: self.raw(x, context), self.spec, self.swap_directions != inverse, self)]

    def raw(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The network's output for the passive part of ``x``, which both directions share.

        Raises:
            ValueError: everything is active and there is no context to predict from.
        """
        if self.spec.active == "all":
            if context is None:
                raise ValueError('AffineCoupling: with active="all" the parameters come from the context; give one.')
            return self.net(context)
        passive = self._passive(x)
        return self.net(passive) if context is None else self.net(passive, context)

    def _passive(self, x: Tensor) -> Tensor:
        if self.spec.active in ("channels", "channels_ceil"):
            channels = x.shape[1]
            return x[:, : (channels + 1) // 2 if self.spec.active == "channels_ceil" else channels // 2]
        return torch.where(active_mask(self.spec, x.shape, x.device), 0.0, x)

    def extra_repr(self) -> str:
        return str(self.spec)
