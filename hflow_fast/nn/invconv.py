"""The invertible 1 × 1 convolution."""

from __future__ import annotations

from typing import Callable, Literal, Sequence

import torch
from torch import Tensor, nn

from ..ops import conv1x1, lu
from ._cache import ParameterCache
from ._folding import ChannelMap, stack
from ._fusion import LazyMap, Piece, per_sample
from ._inversion import invert
from .skew_exponential import Squarings, skew_exponential

__all__ = ["InvConv1x1"]

_PARAMETRIZATIONS = ("plu", "full", "orthogonal")


class InvConv1x1(nn.Module):
    r"""Mixes the channels of every pixel by one learned matrix: z = W x, log-det H·W·log\|det W\|.

    Kingma & Dhariwal, "Glow", NeurIPS 2018, §3.2. W starts as a random rotation. While gradients are off, W, its
    inverse and its log-det are computed once and kept until a parameter changes; inverting a matrix that is numerically
    singular then warns. A singular W has log-det −inf and an inverse of NaN.

    Args:
        channels: C.
        parametrization: "plu": W = P L (U + diag(±e^s)) with fixed P and signs, log-det Σ s (Glow, Eq. 10); "full": W
            itself, by LU with pivoting; "orthogonal": W = exp(A − Aᵀ), log-det 0.

    Example:
        >>> layer = InvConv1x1(4)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> z, log_det = layer(x)
        >>> torch.allclose(layer.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, channels: int, parametrization: Literal["plu", "full", "orthogonal"] = "plu") -> None:
        super().__init__()
        if parametrization not in _PARAMETRIZATIONS:
            raise ValueError(f"InvConv1x1: parametrization must be one of {', '.join(_PARAMETRIZATIONS)}, got "
                             f"{parametrization!r}.")
        self.channels = channels
        self.parametrization = parametrization
        self._cache = ParameterCache()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        if parametrization == "full":
            self.weight = nn.Parameter(rotation)
        elif parametrization == "orthogonal":
            self.generator = nn.Parameter(torch.randn(channels, channels))
            self._squarings = Squarings()
        else:
            permutation, lower, upper = torch.linalg.lu(rotation)
            diagonal = upper.diagonal()
            self.lower = nn.Parameter(lower.tril(-1))
            self.upper = nn.Parameter(upper.triu(1))
            self.log_diagonal = nn.Parameter(diagonal.abs().log())
            self.register_buffer("sign", diagonal.sign())
            self.register_buffer("permutation", permutation.argmax(dim=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, C, …) → latent and log|det| (B,). ``context`` is ignored."""
        matrix, log_abs_det = self.matrix_and_log_det()
        return conv1x1(x, matrix), per_sample(log_abs_det, x.shape)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (B, C, …) → data and log|det| (B,). ``context`` is ignored."""
        matrix, log_abs_det = self._cached("inverse", self._inverse_matrix)
        return conv1x1(z, matrix), per_sample(-log_abs_det, z.shape)

    def pieces(self, inverse: bool, context: Tensor | None = None) -> list[Piece]:
        """What a direction evaluates, for chains that fuse it with its neighbours."""
        parameter = next(self.parameters())
        kind = type(self), self.parametrization, self.channels, parameter.dtype, parameter.device
        return [LazyMap(self, _maps, kind, self.channels, self._evaluate, inverse=inverse)]

    def _evaluate(self, inverse: bool, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(x) if inverse else self.forward(x)

    def matrix_and_log_det(self) -> tuple[Tensor, Tensor]:
        """W (C, C) and log|det W| (0-dim)."""
        return self._cached("matrix", self._matrix)

    def _cached(self, name: str, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return self._cache.get(name, [*self.parameters(), *self.buffers()], compute)

    def _matrix(self) -> tuple[Tensor, Tensor]:
        if self.parametrization == "orthogonal":
            return skew_exponential(self.generator, self._squarings), self.generator.new_zeros(())
        (matrix,), (log_abs_det,) = _matrices([self])
        return matrix, log_abs_det

    def _inverse_matrix(self) -> tuple[Tensor, Tensor]:
        matrix, log_abs_det = self.matrix_and_log_det()
        return invert(matrix, "InvConv1x1").to(torch.promote_types(matrix.dtype, torch.float32)), log_abs_det

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.parametrization}"


def _maps(layers: Sequence[InvConv1x1]) -> ChannelMap:
    """Data to latent: a stack of matrices."""
    kind = type(layers[0])
    if layers[0].parametrization == "orthogonal" or kind.matrix_and_log_det is not InvConv1x1.matrix_and_log_det:
        matrices, log_dets = map(stack, zip(*(layer.matrix_and_log_det() for layer in layers)))
    else:
        matrices, log_dets = _matrices(layers)
    return ChannelMap(matrices, None, log_dets)


def _matrices(layers: Sequence[InvConv1x1]) -> tuple[Tensor, Tensor]:
    """W (N, C, C) and log|det W| (N,) of layers that are no exponentials, all in one go."""
    if layers[0].parametrization == "full":
        weights = stack([layer.weight for layer in layers])
        return weights, lu(weights)[0]
    lower, upper, log_diagonal, sign, permutation = (
        stack([getattr(layer, name) for layer in layers])
        for name in ("lower", "upper", "log_diagonal", "sign", "permutation"))
    count, channels = log_diagonal.shape
    lower = lower.tril(-1) + torch.eye(channels, dtype=lower.dtype, device=lower.device)
    upper = upper.triu(1) + torch.diag_embed(sign * log_diagonal.exp())
    with torch.autocast(lower.device.type, enabled=False):
        product = lower @ upper
    rows = permutation + torch.arange(0, count * channels, channels, device=permutation.device)[:, None]
    return product.flatten(0, 1).index_select(0, rows.flatten()).view_as(product), log_diagonal.sum(-1)
