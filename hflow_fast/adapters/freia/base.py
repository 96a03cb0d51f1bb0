"""What the fused FrEIA layers share."""

from __future__ import annotations

from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ...nn._fusion import Piece, run

__all__ = ["Conditioned", "Evaluated", "FusedLayer", "permute", "with_conditions"]

Evaluated = tuple[Tensor, Tensor]
"""A result and its log|det| (B,)."""


class FusedLayer:
    """Base of the fast classes, beside the stock class.

    A fast class says of a stock layer whether it can take its place, and describes its own directions to a container.
    """

    log_det_per_sample = True
    """Whether the stock layer's log-det is a tensor (B,), and not a number."""

    @staticmethod
    def unfit(layer: nn.Module) -> str:
        """Why a stock ``layer`` has to stay as it is; "": it need not."""
        return ""

    @staticmethod
    def networks(layer: nn.Module) -> tuple[nn.Module, ...]:
        """The user's networks in a stock ``layer``."""
        return ()

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        """One direction for :func:`hflow_fast.nn._fusion.run`.

        Args:
            inverse: Latent → data, FrEIA's ``rev``.
            context: FrEIA's ``c``.
            like: A tensor of the device and dtype that the flow variable has.
        """
        raise NotImplementedError


class Conditioned(FusedLayer):
    """With one network, whose input may hold conditions."""

    @staticmethod
    def networks(layer: nn.Module) -> tuple[nn.Module, ...]:
        return (layer.subnet,)

    def forward(self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False,
                jac: bool = True) -> tuple[tuple[Tensor], Tensor]:
        y, log_det = run(self.pieces(rev, c, x[0]), x[0])
        return (y,), log_det


def with_conditions(layer: nn.Module, passive: Tensor, context: Sequence[Tensor]) -> Tensor:
    """What a network of ``layer`` is given: (B, channels + those of the conditions, …)."""
    return torch.cat([passive, *context], dim=1) if layer.conditional else passive


def permute(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """``x[:, order]``, whose gradient is gathered by the inverse permutation ``back`` instead of scattered."""
    return _Permute.apply(x, order, back)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return permute(grad, back, order), None, None
