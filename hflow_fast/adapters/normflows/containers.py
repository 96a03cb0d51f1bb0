"""The models of normflows, whose layers run fused across their borders."""

from __future__ import annotations

import normflows as nf
import torch
from torch import Tensor, nn

from .chain import evaluate

__all__ = ["ClassCondFlow", "MultiscaleFlow", "NormalizingFlow"]


def _to_data(flows: nn.ModuleList, z: Tensor) -> tuple[Tensor, Tensor]:
    return evaluate(flows, z, sampling=True)


def _to_latent(flows: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    return evaluate(reversed(list(flows)), x, sampling=False)


class NormalizingFlow(nf.NormalizingFlow):
    """One chain of flows. Log-dets that the stock model adds up in torch's default dtype have that dtype."""

    def forward(self, z: Tensor) -> Tensor:
        """Latent → data."""
        return _to_data(self.flows, z)[0]

    def forward_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,)."""
        x, log_det = _to_data(self.flows, z)
        return x, log_det.to(torch.get_default_dtype())

    def inverse(self, x: Tensor) -> Tensor:
        """Data → latent."""
        return _to_latent(self.flows, x)[0]

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,)."""
        z, log_det = _to_latent(self.flows, x)
        return z, log_det.to(torch.get_default_dtype())

    def forward_kld(self, x: Tensor) -> Tensor:
        """The mean negative log-likelihood in nats, 0-dim."""
        return -torch.mean(self.log_prob(x).to(torch.get_default_dtype()))

    def sample(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Samples and their log-likelihoods (B,)."""
        z, log_q = self.q0(num_samples)
        x, log_det = _to_data(self.flows, z)
        return x, (log_q - log_det).to(log_q.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihoods (B,) in nats."""
        z, log_det = _to_latent(self.flows, x)
        return (log_det + self.q0.log_prob(z)).to(x.dtype)


class ClassCondFlow(nf.ClassCondFlow):
    """One chain of flows, with a base distribution per class."""

    def forward_kld(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean negative log-likelihood in nats, 0-dim."""
        return -torch.mean(self.log_prob(x, y))

    def sample(self, num_samples: int = 1, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples and their log-likelihoods (B,)."""
        z, log_q = self.q0(num_samples, y)
        x, log_det = _to_data(self.flows, z)
        return x, (log_q - log_det).to(log_q.dtype)

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-likelihoods (B,) in nats."""
        z, log_det = _to_latent(self.flows, x)
        return (log_det + self.q0.log_prob(z, y)).to(x.dtype)


class MultiscaleFlow(nf.MultiscaleFlow):
    """Levels of flows; each level is one chain."""

    def forward_and_log_det(self, z: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Latents, the coarsest first → data and log|det| (B,)."""
        x, terms = z[0], []
        for level in range(len(self.q0)):
            if level > 0:
                x, term = self.merges[level - 1]([x, z[level]])
                terms.append(term)
            x, term = _to_data(self.flows[level], x)
            terms.append(term)
        if self.transform is not None:
            x, term = self.transform(x)
            terms.append(term)
        return x, sum(terms).to(z[0].dtype)

    def inverse_and_log_det(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Data → latents, the coarsest first, and log|det| (B,)."""
        dtype, z, terms = x.dtype, [], []
        if self.transform is not None:
            x, term = self.transform.inverse(x)
            terms.append(term)
        for level in reversed(range(len(self.q0))):
            x, term = _to_latent(self.flows[level], x)
            terms.append(term)
            if level > 0:
                (x, split_off), term = self.merges[level - 1].inverse(x)
                terms.append(term)
                z.append(split_off)
        return [x, *reversed(z)], sum(terms).to(dtype)

    def sample(self, num_samples: int = 1, y: Tensor | None = None, temperature: float | None = None
               ) -> tuple[Tensor, Tensor]:
        """Samples and their log-likelihoods (B,)."""
        if temperature is not None:
            self.set_temperature(temperature)
        x, terms = None, []
        for level in range(len(self.q0)):
            z, log_q = self.q0[level](num_samples, y) if self.class_cond else self.q0[level](num_samples)
            terms.append(log_q)
            if level == 0:
                x = z
            else:
                x, term = self.merges[level - 1]([x, z])
                terms.append(-term)
            x, term = _to_data(self.flows[level], x)
            terms.append(-term)
        if self.transform is not None:
            x, term = self.transform(x)
            terms.append(-term)
        if temperature is not None:
            self.reset_temperature()
        return x, sum(terms).to(terms[0].dtype)

    def log_prob(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Log-likelihoods (B,) in nats."""
        z, log_q = self.inverse_and_log_det(x)
        for distribution, latent in zip(self.q0, z):
            log_q = log_q + (distribution.log_prob(latent, y) if self.class_cond else distribution.log_prob(latent))
        return log_q
