"""Calling a coupling network that is the user's own: the same operations, with fewer passes over its activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._fusion import is_altered

__all__ = ["call_network"]

_PIXELS_WORTH_REORDERING = 512  # of a whole batch: with fewer, weights take longer to reorder than activations
_REORDERS = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
"""Whether convolutions compute in channels_last, and reorder what comes in another order, to and fro."""

_IN_ANY_ORDER = (nn.Conv2d, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus,
                 nn.Identity, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d)
"""Layers that give the same whatever the order in memory, and keep that order."""


def call_network(network: nn.Module, x: Tensor) -> Tensor:
    """``network(x)``.

    In an ``nn.Sequential`` without hooks rectifiers overwrite what convolutions and linear layers put out; on
    processors with AVX-512 activations are channels_last inside, if all of its layers are known not to mind.
    """
    if type(network) is not nn.Sequential or is_altered(network) or any(map(is_altered, network)):
        return network(x)
    if not (_is_reordered(x) and all(type(layer) in _IN_ANY_ORDER for layer in network)):
        return _overwriting(network, x)
    return _overwriting(network, x.contiguous(memory_format=torch.channels_last)).contiguous()


def _overwriting(network: nn.Sequential, x: Tensor) -> Tensor:
    unneeded = False  # whether x is the output of a layer whose gradient does not depend on it
    for layer in network:
        if unneeded and type(layer) is nn.ReLU:
            x = F.relu(x, inplace=True)
        elif unneeded and type(layer) is nn.LeakyReLU and layer.negative_slope >= 0:  # else its input is needed
            x = F.leaky_relu(x, layer.negative_slope, inplace=True)
        else:
            x = layer(x)
        unneeded = type(layer) in (nn.Conv2d, nn.Linear)
    return x


def _is_reordered(x: Tensor) -> bool:
    return (_REORDERS and x.device.type == "cpu" and x.dtype is torch.float32 and x.dim() == 4
            and x.shape[0] * x.shape[2] * x.shape[3] >= _PIXELS_WORTH_REORDERING
            and not x.is_contiguous(memory_format=torch.channels_last))
