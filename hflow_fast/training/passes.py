"""The forward passes of a step: the noise of each, and how several run as one."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Iterable, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from .._allocator import free_bytes
from .._memory import SavedBytes
from ..data import dequantize
from ..models import Noise
from .config import GeneralConfig
from .randomness import Use, seed_generator, seed_generators

__all__ = ["Pass", "Passes"]

# A GPU belongs to its training; a computer's memory does not.
_SHARE_OF_FREE = {"cuda": 0.8, "cpu": 0.5}
# The peak of a pass over what its graph keeps: benchmarks/memory.py found 0.9 for stored activations, 2.5 for recomputed.
_PEAK_OVER_KEPT = {"store": 1.2, "recompute": 3.0}


class Pass(NamedTuple):
    """What one pass is given."""

    number: int
    """In the step."""
    images: Tensor
    """(N, 3, R, R), uint8."""
    labels: Tensor | None
    """(N,), for a class-conditional model."""


class Passes:
    """Runs a model's passes.

    Args:
        model: with the interface of :class:`hflow_fast.models.HFlow`.
        config: how to train it.
        device: the model's.
    """

    def __init__(self, model: nn.Module, config: GeneralConfig, device: torch.device) -> None:
        self._model = model
        self._config = config
        self._device = device
        self._count = config.samples_per_grad_eval // config.batch_size
        # By the number of the pass, always the same ones: CUDA graphs know them.
        self._generators: defaultdict[int, torch.Generator] = defaultdict(partial(torch.Generator, device))

    @property
    def generators(self) -> Iterable[torch.Generator]:
        """Those that merged passes have drawn from so far, and will have."""
        return self._generators.values()

    def prepared(self) -> AbstractContextManager[object]:
        """Within it, what depends on the weights alone is computed once for all passes, if the model can do so."""
        return getattr(self._model, "prepared", nullcontext)()

    def start_noise(self, step: int, passes: Sequence[Pass]) -> None:
        """Seeds what :meth:`loss` of the same passes draws from.

        The noise of a pass is the same whichever process has it, whatever came before, and what is run with it.
        """
        place = self._config.seed, Use.STEP, step
        if len(passes) == 1:
            seed_generators(self._device, *place, passes[0].number)
            return
        for one in passes:
            seed_generator(self._generators[one.number], *place, one.number)

    def loss(self, passes: Sequence[Pass]) -> Tensor:
        """What the passes, run as one, contribute to the step's loss. Each has its own noise and statistics."""
        if len(passes) == 1:
            x, noise = self.dequantize(passes[0].images), ()
        else:
            generators = [self._generators[one.number] for one in passes]
            x = torch.cat([self.dequantize(one.images, own) for one, own in zip(passes, generators)])
            noise = (Noise(generators),)
        labels = [one.labels for one in passes if one.labels is not None]
        losses = self._model.loss(x, *noise, **({"labels": torch.cat(labels)} if labels else {}))
        return losses.mean() * (len(passes) / self._count)

    def dequantize(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the model is given of 8-bit images, on its device, with the noise and the flips of training."""
        config = self._config
        return dequantize(images.to(self._device), bits=config.discretization_bits, noise_std=config.added_noise_std,
                          flip=config.horizontal_flips, generator=generator)

    def that_fit(self, example: Pass) -> int:
        """How many passes a part of the free memory has room for, at least 1: 0.8 of a GPU's, 0.5 of a CPU's.

        It runs the example forward. A step is quickest in as few passes as possible: convolutions read their weights
        once for all images, and each launch does more.
        """
        left = free_bytes(self._device)
        if left is None:
            return 1
        self.start_noise(0, [example])
        with self.prepared(), SavedBytes() as kept:
            result = self.loss([example])
        pass_bytes = _PEAK_OVER_KEPT[self._config.memory] * kept.total
        del result
        return max(1, int(_SHARE_OF_FREE[self._device.type] * left / max(pass_bytes, 1)))
