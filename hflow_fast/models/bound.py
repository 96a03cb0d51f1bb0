"""An image's log-likelihood, or a bound on it, level by level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics import bits_per_dim

__all__ = ["LevelTerms", "LikelihoodBound", "gaussian_log_prob"]


@dataclass(frozen=True)
class LevelTerms:
    """One level's contribution, in nats: log p = log_prior + log_det + entropy."""

    log_prior: Tensor
    """Log-density of the latent, (B,)."""
    log_det: Tensor
    """log|det| of the level's flow, data → latent, (B,)."""
    entropy: Tensor | float
    """Entropy of the noise on the level's target, (B,); 0 without noise, as in Glow."""
    dims: int
    """Values per image at this level."""
    weight: float
    """Factor in the training loss."""

    @property
    def nats(self) -> Tensor:
        """Negative log-likelihood, (B,)."""
        return -(self.log_prior + self.log_det + self.entropy)

    @property
    def bits(self) -> Tensor:
        """Negative log-likelihood in bits per dimension of this level, (B,)."""
        return bits_per_dim(self.nats, self.dims, bits=0)


@dataclass(frozen=True)
class LikelihoodBound:
    """−log p(x) of a Glow, or HFlow's variational bound on it: the sum of its levels' terms, lowest level first."""

    terms: dict[str, LevelTerms]
    """Keyed by the resolution of the level's latent; before them, in an HFlow, ``"endblock.0"``, …."""
    dims: int
    """Values per image."""
    penalty: Tensor | None = None
    """What the loss has beside them, (B,): a class-conditional Glow's weighted classifier loss."""

    @property
    def nats(self) -> Tensor:
        """−log p(x), or its upper bound, in nats, x in [-0.5, 0.5], (B,)."""
        return torch.stack([term.nats for term in self.terms.values()]).sum(dim=0)

    @property
    def levels(self) -> dict[str, Tensor]:
        """Bits per dimension of each level, (B,)."""
        return {name: term.bits for name, term in self.terms.items()}

    @property
    def loss(self) -> Tensor:
        """What training minimises: the levels' bits per dimension times their weights, and the penalty, (B,)."""
        loss = torch.stack([term.bits * term.weight for term in self.terms.values()]).sum(dim=0)
        return loss if self.penalty is None else loss + self.penalty

    def bits_per_dim(self, bits: int = 8) -> Tensor:
        """Bits per dimension of the image, for pixels of ``bits`` bits scaled to one unit, (B,)."""
        return bits_per_dim(self.nats, self.dims, bits)


def gaussian_log_prob(z: Tensor, std: float) -> Tensor:
    """log N(z; 0, std²) summed over everything but the batch, in nats: (B, …) → (B,)."""
    dims = math.prod(z.shape[1:])
    return -0.5 * (z / std).square().flatten(1).sum(dim=1) - dims * (0.5 * math.log(2.0 * math.pi) + math.log(std))
