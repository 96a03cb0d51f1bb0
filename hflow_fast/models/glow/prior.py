"""The Gaussian priors of the latents: of what leaves at a split, given what stays, and of the last latent.

Each is the map ε = (z − mean)/e^logs to a standard normal: a coupling whose log-det is −Σ logs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._fusion import Coupling
from ...ops import CouplingSpec
from ..precision import widen
from .folding import Folding
from .network import LOGS_FACTOR, ConvStack, convolve, on_padding, padding_taps

__all__ = ["ClassEmbedding", "Classifier", "SplitPrior", "TopPrior"]


class SplitPrior(nn.Module):
    """Of the second half of the channels, given the first."""

    SPEC = CouplingSpec(scale_map="exp", layout="interleaved", shift_first=True, active="channels")

    def __init__(self, channels: int, resolution: int, edge_bias: bool) -> None:
        super().__init__()
        self.network = ConvStack(1, (channels // 2, channels), 3, resolution, zero_init=True,
                                 edge="output" if edge_bias else None)

    def coupling(self, inverse: bool) -> Coupling:
        """ε → z, or its inverse."""
        (weight, bias), = self.network.each()

        def raw(x: Tensor) -> Tensor:
            return convolve(x[:, : x.shape[1] // 2].to(weight.dtype), weight, bias)

        return Coupling(raw, self.SPEC, inverse)


class TopPrior(Folding):
    """Of the last latent: a mean and a log-scale for each channel, which differ at the edges.

    The original has a convolution of zeros here, of which nothing but bias, scale and edge bias is ever used or
    trained: those it has here.
    """

    SPEC = CouplingSpec(scale_map="exp", layout="halves", shift_first=True, active="all")

    def __init__(self, channels: int, resolution: int, edge_bias: bool) -> None:
        super().__init__()
        self.resolution = resolution
        self.bias = nn.Parameter(torch.zeros(2 * channels))
        self.logs = nn.Parameter(torch.zeros(2 * channels))
        self.edge = nn.Parameter(torch.zeros(2 * channels, 3, 3)) if edge_bias else None
        self.register_buffer("taps", padding_taps(resolution) if edge_bias else None, persistent=False)

    def fold(self) -> tuple[Tensor]:
        """Mean and logs, (2C, R, R)."""
        scale = torch.exp(LOGS_FACTOR * self.logs)[:, None, None]
        bias = self.bias[:, None, None].expand(-1, self.resolution, self.resolution)
        return ((bias if self.edge is None else bias + on_padding(self.edge, self.taps)) * scale,)


class ClassEmbedding(nn.Module):
    """What a class adds to mean and logs of the last latent's prior, starting at zero."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, 2 * channels))
        self.bias = nn.Parameter(torch.zeros(2 * channels))
        self.logs = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B,), int64 → (B, 2C, 1, 1)."""
        table = (self.weight + self.bias) * torch.exp(LOGS_FACTOR * self.logs)
        return F.embedding(labels, table)[:, :, None, None]


class Classifier(nn.Module):
    """Predicts the class from the last latent, starting at equal odds."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, channels))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.logs = nn.Parameter(torch.zeros(classes))

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, R, R) → logits (B, classes)."""
        features = z.mean(dim=(2, 3)).to(self.weight.dtype)
        return widen(F.linear(features, self.weight, self.bias)) * torch.exp(LOGS_FACTOR * self.logs)

    def bits(self, z: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of ``labels`` (B,) in bits, (B,)."""
        return F.cross_entropy(self(z), labels, reduction="none") / math.log(2.0)
