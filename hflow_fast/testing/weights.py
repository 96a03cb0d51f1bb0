"""Weights to test with, and everything as it was afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["preserved", "randomize"]


@contextmanager
def randomize(layer: nn.Module, seed: int = 0, scale: float = 0.3) -> Iterator[nn.Module]:
    r"""Gives ``layer`` weights as after some training, for the length of a ``with`` block.

    Fresh layers hide faults: networks that end in zeros make couplings the identity, actnorms start as it. Here every
    floating parameter θ gets normal noise added, in place as by an optimizer step, of standard deviation

    .. math:: \text{scale} \cdot \max(\mathrm{rms}(\theta),\ \text{fan\_in}^{-1/2})

    where a vector's fan-in is 1. At the default scale a rotation's singular values stay within 1 ± 0.6: invertible.
    Buffers keep their values.

    Args:
        layer: Any module.
        seed: Of the noise. The global random state is not touched.
        scale: Of the noise.

    Yields:
        ``layer``. Afterwards its parameters, buffers, attributes and mode are what they were.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> before = layer.weight.clone()
        >>> with randomize(layer, seed=1):
        ...     torch.equal(layer.weight, before)
        False
        >>> torch.equal(layer.weight, before)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    with preserved(layer):
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.is_floating_point() and parameter.numel():
                    fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                    deviation = scale * max(float(parameter.double().square().mean()) ** 0.5, fan_in**-0.5)
                    noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                    parameter.add_((deviation * noise).to(parameter))
        yield layer


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside, ``module`` leaves with the tensors, attributes and mode that it had.

    Values come back in place, so that an optimizer still holds the parameters, and caches see a new version.
    """
    tensors = [(tensor, tensor.data, tensor.detach().clone())
               for tensor in itertools.chain(module.parameters(), module.buffers())]
    tables = [(table, dict(table)) for part in module.modules()
              for table in (vars(part), *(value for value in vars(part).values() if isinstance(value, dict)))]
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)
        with torch.no_grad():
            for tensor, data, value in tensors:
                tensor.data = data
                tensor.copy_(value)
