"""Random numbers that depend on where they are used, and on nothing that happened before.

Before each piece of work the global generators start anew, from a seed that is a function of the run's seed and the
place of the work. So noise is the same for any number of processes, after any evaluation and after a resume, and no
generator's state is ever saved.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

__all__ = ["Use", "seed_generator", "seed_generators"]


class Use(IntEnum):
    """What random numbers are for; each use has a stream of its own."""

    INITIALIZATION = 0
    STEP = 1
    EVALUATION = 2


def seed_generators(device: torch.device, seed: int, use: Use, *place: int) -> None:
    """Starts PyTorch's global generators of the CPU and of ``device`` anew. The device is not waited for.

    A CUDA graph that draws from the device's generator follows, if this is called before its replay. PyTorch's
    generator of the CPU takes 32 bits of a seed: among a million passes a few share their noise, each with images of
    its own.

    Args:
        seed: of the run, at least 0.
        place: the numbers of the piece of work: step, pass within the step, …
    """
    value = _seed_of(seed, use, *place)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(value)


def seed_generator(generator: torch.Generator, seed: int, use: Use, *place: int) -> None:
    """Lets ``generator`` draw what the global one of its device does after :func:`seed_generators`.

    For pieces of work that are done at the same time, each with a generator of its own. A CUDA graph follows that knows
    the generator.
    """
    generator.manual_seed(_seed_of(seed, use, *place))


def _seed_of(seed: int, use: Use, *place: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(use, *place)).generate_state(1, np.uint64)[0])
