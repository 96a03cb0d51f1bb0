"""Chains of flow layers, and the fused flow step."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..ops import CouplingSpec
from ._cache import ParameterCache
from ._fusion import Piece, pieces_of, run
from .actnorm import ActNorm
from .coupling import AffineCoupling
from .invconv import InvConv1x1

__all__ = ["FlowStep", "Sequential"]


class Sequential(nn.Sequential):
    """Flow layers one after another; log-dets add up. ``inverse`` runs them backwards. ``context`` goes to each.

    Neighbours run fused, in both directions: :class:`~.actnorm.ActNorm` and :class:`~.invconv.InvConv1x1` fold into one
    matrix, which runs in one pass with the :class:`~.coupling.AffineCoupling` before it, also across nested containers
    and :class:`FlowStep`. Results are those of the layers one by one, but for rounding; so are gradients. While
    gradients are off, the folded matrices, and their inverses in float64, are kept until a parameter changes.

    Any module with the interface of a flow layer may stand between. It is called as it is; and so are layers with hooks
    on them, instances of subclasses with a ``forward`` or ``inverse`` of their own, and actnorms that are about to
    initialise themselves from data.

    Example:
        >>> import torch
        >>> def step() -> list[nn.Module]:
        ...     return [ActNorm(4), InvConv1x1(4), AffineCoupling(nn.Conv2d(2, 4, 3, padding=1))]
        >>> chain = Sequential(*step(), *step())
        >>> x = torch.randn(2, 4, 8, 8)
        >>> z, log_det = chain(x)
        >>> torch.allclose(chain.inverse(z)[0], x, atol=1e-4)
        True
    """

    def __init__(self, *layers: nn.Module | OrderedDict[str, nn.Module]) -> None:
        super().__init__(*layers)
        self._cache = ParameterCache()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,)."""
        return run(self.pieces(False, context), x, self._cache, type(self).__name__)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,)."""
        return run(self.pieces(True, context), z, self._cache, type(self).__name__)

    def pieces(self, inverse: bool, context: Tensor | None = None) -> list[Piece]:
        """What a direction evaluates, for chains that this one is part of."""
        layers = list(self)[::-1] if inverse else self
        return [piece for layer in layers for piece in pieces_of(layer, inverse, context)]


class FlowStep(nn.Module):
    """Coupling → actnorm → 1 × 1 convolution, data to latent, in one read and one write of the flow variable.

    A chain of these behind one :class:`~.actnorm.ActNorm` and :class:`~.invconv.InvConv1x1` is Glow (whose step is
    written actnorm → 1 × 1 → coupling), with every pass between two networks fused. The inverse undoes the actnorm and
    the convolution by one matrix, too: the inverse, in float64, of the very matrix that the forward direction applies.
    In a :class:`Sequential` that matrix and the coupling of the step before it run in one pass as well.

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
        return run(self.pieces(False, context), x, self._cache, type(self).__name__)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (B, C, …) → data and log|det| (B,)."""
        return run(self.pieces(True, context), z, self._cache, type(self).__name__)

    def pieces(self, inverse: bool, context: Tensor | None = None) -> list[Piece]:
        """What a direction evaluates, for chains that this one is part of."""
        layers = (self.coupling, self.actnorm, self.invconv)
        return [piece for layer in (layers[::-1] if inverse else layers) for piece in layer.pieces(inverse, context)]
