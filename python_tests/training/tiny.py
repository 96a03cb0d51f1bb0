"""A flow of one affine level with the interface of the models, so that training is tested in milliseconds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SIZE = 8


class Bound(NamedTuple):
    nats: Tensor
    levels: dict[str, Tensor]


class TinyFlow(nn.Module):
    """z = (x − shift) · e^log_scale, element by element; an encoder and a decoder add their shares to the shift."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(3, 1, 1))
        self.log_scale = nn.Parameter(torch.randn(3, SIZE, SIZE) * 0.1)
        self.decoder = nn.Parameter(torch.randn(3, SIZE, SIZE) * 0.1)
        self.register_buffer("initialized", torch.tensor(False))
        self.resolution = SIZE
        self.dims = 3 * SIZE * SIZE
        self.latent_shapes = [(3, SIZE, SIZE)]
        self.noise = noise

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"encoders": [self.encoder], "flows": [self.log_scale], "decoders": [self.decoder]}

    def initialize(self, x: Tensor) -> None:
        if not self.initialized:
            with torch.no_grad():
                self.encoder.copy_(x.mean(dim=(0, 2, 3)).reshape(3, 1, 1))
            self.initialized.fill_(True)

    def bound(self, x: Tensor, noise: bool = True) -> Bound:
        x = x + self.noise * torch.randn_like(x)
        (z,), log_det = self.encode(x)
        nats = 0.5 * z.square().sum(dim=(1, 2, 3)) + 0.5 * self.dims * math.log(2 * math.pi) - log_det
        return Bound(nats, {str(SIZE): nats / (self.dims * math.log(2)) + 8})

    def loss(self, x: Tensor, noise: bool = True) -> Tensor:
        return self.bound(x, noise).nats / (self.dims * math.log(2))

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        z = (x - self.encoder - self.decoder) * self.log_scale.exp()
        return [z], self.log_scale.sum().expand(len(x))

    def decode(self, latents: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = latents[0] * (-self.log_scale).exp() + self.encoder + self.decoder
        return x, -self.log_scale.sum().expand(len(x))

    def latent_stds(self, std: float = 1.0) -> list[float]:
        return [std]

    def sample(self, n: int, std: float = 0.8, generator: torch.Generator | None = None) -> Tensor:
        return self.decode([std * torch.randn(n, 3, SIZE, SIZE, generator=generator)])[0]


class TinyClassFlow(TinyFlow):
    """Whose shift depends on the class, by a table that its initialisation from data sets."""

    def __init__(self, num_classes: int = 2, noise: float = 0.0) -> None:
        super().__init__(noise)
        self.num_classes = num_classes
        self.shifts = nn.Parameter(torch.zeros(num_classes, 3, 1, 1))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"flows": list(self.parameters())}

    def initialize(self, x: Tensor, labels: Tensor) -> None:
        super().initialize(x)
        with torch.no_grad():
            for label in labels.unique():
                self.shifts[label] = (x[labels == label].mean(dim=(0, 2, 3)) - self.encoder.flatten())[:, None, None]

    def bound(self, x: Tensor, noise: bool = True, *, labels: Tensor) -> Bound:
        return super().bound(x - self.shifts[labels], noise)

    def loss(self, x: Tensor, noise: bool = True, *, labels: Tensor) -> Tensor:
        return self.bound(x, noise, labels=labels).nats / (self.dims * math.log(2))


def tiny_config(**general: Any) -> dict[str, Any]:
    """A configuration; keyword arguments override keys of GENERAL. MODEL_PARAMETERS is a placeholder."""
    defaults = {
        "LEARNING_RATE": 5e-3, "LEARNING_RATE_DECODERS": 2e-3, "LEARNING_RATE_ENCODERS": 5e-4,
        "LEARNING_RATE_DECAY_START": 10, "LEARNING_RATE_DECAY": 0.95, "LEARNING_RATE_DECAY_ENCODERS": 0.92,
        "LEARNING_RATE_CUT_ENCODERS": 60, "BATCH_SIZE": 2, "SAMPLES_PER_GRAD_EVAL": 4, "STEPS": 6,
        "ADDED_NOISE_STD": 0.005, "MERGE_BATCHES": 1,
    }
    return {"GENERAL": defaults | general, "MODEL_PARAMETERS": {}, "OUTPUT": {}}
