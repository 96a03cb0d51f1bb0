"""The endblock: flows of the one-pixel code at the bottom of the hierarchy."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from ..bound import LevelTerms, gaussian_log_prob
from .affines import StepAffines
from .architecture import hflow_coupling
from .config import EndblockConfig
from .coupling_nets import VectorCouplingNet
from .flow import ConditionalFlow
from .layers import EqualConv2d, EqualLinear
from .noise import Noise, add_noise, perturb

__all__ = ["Endblock", "StyleNetwork"]


class Endblock(nn.Module):
    """The code's channels in partitions: the first with an unconditional flow, each later one given those before it.

    The code and its latent are (B, C, 1, 1).
    """

    style_mask: Tensor
    base_mask: Tensor

    def __init__(self, settings: EndblockConfig) -> None:
        super().__init__()
        self.partitions = settings.partitions
        self.noise = settings.style_rel_noises
        self.decoder_noise = [noise * settings.style_rel_noise_scale for noise in settings.style_rel_noises]
        self.flows = nn.ModuleList(_partition_flow(settings, index) for index in range(len(self.partitions)))
        self.contexts = nn.ModuleList(
            EqualConv2d(sum(self.partitions[:index]), settings.cond_output_channels[index], 1, activation="linear")
            for index in range(1, len(self.partitions)))
        self.register_buffer("style_mask", _zero_between(settings.mask_for_style_ind, sum(self.partitions)),
                             persistent=False)
        self.register_buffer("base_mask", _zero_between(settings.mask_for_base_ind, sum(self.partitions)),
                             persistent=False)

    def encode(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """Code → latent, with log|det| (B,)."""
        parts = code.split(self.partitions, dim=1)
        results = [flow(part, self._context(parts, index))
                   for index, (flow, part) in enumerate(zip(self.flows, parts))]
        return _joined(results)

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latent → code, with log|det| (B,)."""
        parts: list[Tensor] = []
        results = []
        for index, (flow, part) in enumerate(zip(self.flows, latent.split(self.partitions, dim=1))):
            results.append(flow.inverse(part, self._context(parts, index)))
            parts.append(results[-1][0])
        return _joined(results)

    def bound(self, code: Tensor, noise: Noise) -> dict[str, LevelTerms]:
        """The terms of the bound, one entry per partition.

        Each flow sees its own part with noise and cut from the graph, and the parts before it clean: the encoder
        learns through the conditioning only.
        """
        parts = code.split(self.partitions, dim=1)
        terms = {}
        for index, (flow, part, relative_std) in enumerate(zip(self.flows, parts, self.noise)):
            noisy, entropy = add_noise(part, relative_std, noise)
            z, log_det = flow(noisy, self._context(parts, index))
            terms[f"endblock.{index}"] = LevelTerms(gaussian_log_prob(z, 1.0), log_det, entropy, part.shape[1], 1.0)
        return terms

    def perturb(self, code: Tensor, noise: Noise) -> Tensor:
        """The code with the noise that the decoders are made robust to."""
        parts = code.split(self.partitions, dim=1)
        return torch.cat([perturb(part, relative_std, noise)
                          for part, relative_std in zip(parts, self.decoder_noise)], dim=1)

    def _context(self, parts: Sequence[Tensor], index: int) -> Tensor | None:
        return self.contexts[index - 1](torch.cat(parts[:index], dim=1)) if index else None


class StyleNetwork(nn.Module):
    """Code (B, C, 1, 1) → style (B, S): six linear layers with leaky ReLU."""

    def __init__(self, channels: int, style_channels: int, lr_scale: float) -> None:
        super().__init__()
        widths = [channels, *[style_channels] * 6]
        self.layers = nn.Sequential(*(EqualLinear(before, after, lr_scale=lr_scale)
                                      for before, after in zip(widths, widths[1:])))

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code.flatten(1))


def _partition_flow(settings: EndblockConfig, index: int) -> ConditionalFlow:
    channels, steps = settings.partitions[index], settings.layers[index]
    context_channels = settings.cond_output_channels[index] if index else None
    parametrization = "orthogonal" if settings.use_unitary_permute else "full"
    return ConditionalFlow(
        [hflow_coupling("channels", number) for number in range(steps)],
        [VectorCouplingNet(channels, settings.rnvp_channels[index], context_channels) for _ in range(steps)],
        # One pixel has no statistics to initialise from.
        StepAffines(steps, channels, parametrization, settings.permute_scaling, data_init=False))


def _zero_between(limits: tuple[int, int], channels: int) -> Tensor:
    mask = torch.ones(1, channels, 1, 1)
    mask[:, limits[0]:limits[1]] = 0.0
    return mask


def _joined(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([part for part, _ in results], dim=1), torch.stack([term for _, term in results]).sum(dim=0)
