"""3×3 convolutions on a processor, by Winograd's minimal filtering.

oneDNN, which computes PyTorch's convolutions there, has no such kernel for float32; cuDNN has. It takes a quarter of the
multiplications, at the price of rounding: beside float64, results are off by 1e-6 to 3e-6 of their norm, where PyTorch's
are off by 0.1e-6 to 1.2e-6 (``benchmarks/bench_conv3x3.py``). ``HFLOW_FAST_WINOGRAD=0`` in the environment leaves all
convolutions to PyTorch.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from hflow_fast._extension import build_info, has_kernel
from hflow_fast.ops._registration import format_of, register

__all__ = ["conv3x3", "is_quick", "wants_more_than_a_kernel"]

_WANTED = os.environ.get("HFLOW_FAST_WINOGRAD", "1") != "0"
_TILE = 4
_FEWEST_CHANNELS = 20
_FEWEST_TILES = 32
_LARGE = 256 * 256  # products of channels above which transforming the weights takes more tiles to pay
_FEWEST_TILES_IF_LARGE = 64


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, groups: int = 1) -> torch.Tensor:
    """:func:`torch.nn.functional.conv2d` with padding 1, by our kernel where that is quicker.

    It is on a processor, for float32 in channels_last with enough channels and pixels.

    Args:
        x: (B, C, H, W).
        weight: (K, C / groups, 3, 3).
        bias: (K,).
        groups: Each sees its own equal part of the channels.

    Returns:
        (B, K, H, W). It has the same bits for any number of threads, and for a sample whatever the batch, as long as
        the same kernel is chosen.
    """
    if _pays(x, weight, groups) and x.dtype == weight.dtype == bias.dtype == torch.float32:
        return _kernel(x, weight, bias, groups)
    return F.conv2d(x, weight, bias, padding=1, groups=groups)


def is_quick() -> bool:
    """Whether this processor has the vectors (AVX2 or AVX-512) with which the kernel beats PyTorch's convolutions."""
    return _WANTED and has_kernel("conv3x3", torch.device("cpu")) and build_info()["vector_selected"] != "baseline"


def _pays(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    if x.device.type != "cpu" or not _WANTED or wants_more_than_a_kernel() or format_of(x) != torch.channels_last:
        return False
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    tiles = x.shape[0] * -(-x.shape[2] // _TILE) * -(-x.shape[3] // _TILE)
    enough = _FEWEST_TILES_IF_LARGE if outputs * inputs > _LARGE else _FEWEST_TILES
    return min(outputs, inputs) >= _FEWEST_CHANNELS and tiles >= enough and has_kernel("conv3x3", x.device)


def wants_more_than_a_kernel() -> bool:
    """Autocast, function transforms and forward mode are served by PyTorch's convolution."""
    return (torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0)  # fmt: skip


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_kernel = register("conv3x3", 3, _fake, autocast=False, second_derivative="set HFLOW_FAST_WINOGRAD=0")
