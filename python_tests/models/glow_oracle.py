"""Glow as its facts say, step by step in plain torch, with nothing folded or fused: what the model is compared with."""

from __future__ import annotations

import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from hflow_fast.models import Glow

SMALL = {"RESOLUTION": 8, "LEVELS": 2, "STEPS": 2, "WIDTH": 6, "COUPLING": "affine", "PERMUTATION": "1x1"}
CLASSES = {"CONDITIONAL": True, "NUM_CLASSES": 3}


def images(count: int = 4, resolution: int = 8, seed: int = 1) -> Tensor:
    """Smooth to the eye they are not, but their channels differ in mean and scale."""
    x = torch.rand(count, 3, resolution, resolution, generator=torch.Generator().manual_seed(seed)) - 0.5
    return x * torch.tensor([1.0, 0.6, 0.3])[:, None, None] + torch.tensor([0.0, 0.1, -0.2])[:, None, None]


def trained_like(dtype: torch.dtype = torch.float32, seed: int = 0, **keys) -> Glow:
    """A small Glow, initialised from data and then moved away from zeros and rotations, in training mode."""
    torch.manual_seed(seed)
    model = Glow.from_config(SMALL | keys)
    model.initialize(images(32, model.resolution, seed=7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


class Likelihood(NamedTuple):
    log_prob: Tensor
    latents: list[Tensor]
    classifier_bits: Tensor | float


def likelihood(model: Glow, x: Tensor, labels: Tensor | None = None,
               watch: Callable[[str, Tensor], None] = lambda name, value: None) -> Likelihood:
    """log p(x) in nats, the standardised latents, and the classifier's cross-entropy, of ``model``'s parameters.

    ``watch`` is shown the output of every activation norm that data initialises.
    """
    config = model.config
    log_prob, latents = torch.zeros(len(x), dtype=x.dtype), []
    for number, level in enumerate(model.levels):
        x = squeeze(x)
        for step in range(config.steps):
            x, term = flow_step(model, level, step, x, lambda name, value: watch(f"{number}.{step}.{name}", value))
            log_prob = log_prob + term
        if level.prior is not None:
            stays, leaves = x.chunk(2, dim=1)
            raw = normed_conv(level.prior.network, 0, stays, config.edge_bias)
            latent, term = gaussian(leaves, raw[:, 0::2], raw[:, 1::2])
            latents.append(latent)
            log_prob, x = log_prob + term, stays
    mean, logs = top_prior(model, x, labels).chunk(2, dim=1)
    latent, term = gaussian(x, mean, logs)
    bits = 0.0
    if labels is not None:
        head = model.classifier
        logits = (x.mean(dim=(2, 3)) @ head.weight.T + head.bias) * torch.exp(3 * head.logs)
        bits = -torch.log_softmax(logits, dim=1)[torch.arange(len(x)), labels] / math.log(2)
    return Likelihood(log_prob + term, [*latents, latent], bits)


def squeeze(x: Tensor) -> Tensor:
    """Channel c, row 2i + dy, column 2j + dx → channel 4c + 2dy + dx, row i, column j."""
    return torch.stack([x[..., dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)], dim=2).flatten(1, 2)


def flow_step(model: Glow, level, step: int, x: Tensor, watch) -> tuple[Tensor, Tensor]:
    affines, pixels = level.steps.affines, x.shape[2] * x.shape[3]
    x = norm(x, affines.bias[step], affines.logs[step])
    watch("actnorm", x)
    log_det = 3 * affines.logs[step].sum() * pixels
    if affines.permutation in ("reverse", "shuffle"):
        x = x.flip(1) if affines.permutation == "reverse" else x[:, affines.order[step]]
    else:
        matrix = affines.weight[step] if affines.permutation == "1x1" else from_lu(affines, step)
        x = torch.einsum("ij,bjhw->bihw", matrix, x)
        log_det = log_det + torch.linalg.slogdet(matrix).logabsdet * pixels
    passive, active = x.chunk(2, dim=1)
    raw = network(level.steps.networks, step, passive, model.config.edge_bias, watch)
    if model.config.coupling == "additive":
        return torch.cat([passive, active + raw], dim=1), log_det.expand(len(x))
    scale = torch.sigmoid(raw[:, 1::2] + 2)
    return torch.cat([passive, (active + raw[:, 0::2]) * scale], dim=1), log_det + scale.log().sum(dim=(1, 2, 3))


def from_lu(affines, step: int) -> Tensor:
    identity = torch.eye(affines.lower.shape[-1], dtype=affines.lower.dtype)
    lower = torch.tril(affines.lower[step], -1) + identity
    upper = torch.triu(affines.upper[step], 1) + torch.diag(affines.sign[step] * affines.log_diagonal[step].exp())
    return identity[affines.order[step]] @ lower @ upper


def network(networks, step: int, x: Tensor, edge_bias: bool, watch) -> Tensor:
    x = normed_conv(networks.first, step, x, edge_bias)
    watch("first", x)
    x = normed_conv(networks.second, step, F.relu(x), False)
    watch("second", x)
    return normed_conv(networks.last, step, F.relu(x), edge_bias)


def normed_conv(stack, step: int, x: Tensor, edge_bias: bool) -> Tensor:
    size = stack.bias.shape[1]
    weight = stack.weight[step * size:(step + 1) * size]
    if edge_bias:
        padding = F.pad(torch.zeros_like(x[:, :1]), (1, 1, 1, 1), value=1.0)
        x = F.conv2d(torch.cat([F.pad(x, (1, 1, 1, 1)), padding], dim=1), weight)
    else:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return norm(x, stack.bias[step], stack.logs[step])


def norm(x: Tensor, bias: Tensor, logs: Tensor) -> Tensor:
    return (x + bias[:, None, None]) * torch.exp(3 * logs)[:, None, None]


def top_prior(model: Glow, z: Tensor, labels: Tensor | None) -> Tensor:
    top, classes = model.top, model.embedding
    raw = torch.zeros(len(z), 2 * z.shape[1], *z.shape[2:], dtype=z.dtype)
    if top is not None:
        if top.edge is not None:
            padding = F.pad(torch.zeros_like(z[:, :1]), (1, 1, 1, 1), value=1.0)
            raw = raw + F.conv2d(padding, top.edge[:, None])
        raw = norm(raw, top.bias, top.logs)
    if classes is not None:
        raw = raw + ((classes.weight[labels] + classes.bias) * torch.exp(3 * classes.logs))[..., None, None]
    return raw


def gaussian(z: Tensor, mean: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    log_prob = Normal(mean, logs.exp()).log_prob(z).sum(dim=(1, 2, 3))
    return (z - mean) / logs.exp(), log_prob
