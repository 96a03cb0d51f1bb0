"""One level of the hierarchy: encoder, decoder and flow at one resolution."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..bound import LevelTerms, gaussian_log_prob
from .affines import StepAffines
from .architecture import LevelSpec, StepSpec
from .coupling_nets import PlainCouplingNet, PoolingCouplingNet
from .decoder import Decoded, LevelDecoder
from .encoder import LevelEncoder
from .flow import ConditionalFlow
from .layers import EqualConv2d
from .noise import Noise, add_noise

__all__ = ["Level"]


class Level(nn.Module):
    """Models the target y (B, C, R, R) of this level given the target of the level below.

    Every direction takes ``below`` (B, C', R/ratio, R/ratio), ``style`` (B, S) and ``skip``, the features handed up by
    the level below (None at the lowest), and returns the features that it hands up itself.
    """

    def __init__(self, spec: LevelSpec, style_channels: int) -> None:
        super().__init__()
        self.spec = spec
        hidden = spec.decoder.hidden_channels
        self.encoder = LevelEncoder(spec)
        self.decoder = LevelDecoder(spec, style_channels)
        self.context = EqualConv2d(hidden, spec.context_channels, 1, activation="linear")
        self.skip = None
        if not spec.is_finest:
            self.skip = EqualConv2d(hidden, spec.skip_out_channels, 1, activation="linear",
                                    lr_scale=spec.decoder.lr_scale)
        parametrization = "orthogonal" if spec.orthogonal else "full"
        self.flow = ConditionalFlow(
            [step.coupling for step in spec.steps],
            [_coupling_net(spec, step) for step in spec.steps],
            StepAffines(len(spec.steps), spec.channels, parametrization, spec.permute_gain, data_init=True))

    @property
    def name(self) -> str:
        """The resolution, as a key of the bound's terms."""
        return str(self.spec.resolution)

    def encode(self, target: Tensor, below: Tensor, style: Tensor | None,
               skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Target → latent (B, C, R, R), log|det| (B,), features."""
        decoded = self.decoder(below, style, skip)
        z, log_det = self.flow(target, self.context(decoded.features), decoded.start, decoded.end)
        return z, log_det, self._hand_up(decoded)

    def decode(self, latent: Tensor, below: Tensor, style: Tensor | None,
               skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latent → target (B, C, R, R), log|det| (B,), features."""
        decoded = self.decoder(below, style, skip)
        y, log_det = self.flow.inverse(latent, self.context(decoded.features), decoded.start, decoded.end)
        return y, log_det, self._hand_up(decoded)

    def bound(self, target: Tensor, below: Tensor, style: Tensor | None, skip: Tensor | None, *, noise: Noise,
              pixel_scale: float) -> tuple[LevelTerms, Tensor | None]:
        """The level's terms of the bound, and features.

        The flow's input is cut from the graph: encoders learn through the conditioning path only.

        Args:
            noise: on the target, and in training mode on ``below``. The entropy of the target's noise counts even
                if none is sampled.
            pixel_scale: factor on the image before it came here, accounted for at the finest level.
        """
        entropy: Tensor | float = 0.0
        if self.spec.flow_noise is None:
            noisy = target.detach()
        else:
            noisy, entropy = add_noise(target, self.spec.flow_noise, noise)
        if noise.sample and self.training:
            below = self.decoder.perturb(below, noise)
        z, log_det, features = self.encode(noisy, below, style, skip)
        dims = math.prod(target.shape[1:])
        if self.spec.is_finest:
            log_det = log_det + dims * math.log(pixel_scale)
        log_prior = gaussian_log_prob(z, self.spec.prior_std)
        return LevelTerms(log_prior, log_det, entropy, dims, self.spec.loss_weight), features

    def _hand_up(self, decoded: Decoded) -> Tensor | None:
        return None if self.skip is None else self.skip(decoded.features)


def _coupling_net(level: LevelSpec, step: StepSpec) -> nn.Module:
    network = PoolingCouplingNet if step.network == "pooling" else PlainCouplingNet
    return network(level.channels, level.resolution, step)
