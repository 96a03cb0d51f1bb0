"""The coupling network of normflows' Glow."""

from __future__ import annotations

import normflows as nf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._state import cache_of, is_set
from ..networks import is_reordered

__all__ = ["ConvNet2d", "is_plain"]


class ConvNet2d(nf.nets.ConvNet2d):
    """Activations overwrite what they are of, and actnorms are folded into the convolutions before them.

    On processors with AVX-512 activations are channels_last inside, the order that their convolutions compute in.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → raw parameters of a coupling."""
        if not is_reordered(x):
            return self._activated(x)
        return self._activated(x.contiguous(memory_format=torch.channels_last)).contiguous()

    def _activated(self, x: Tensor) -> Tensor:
        folded = False
        for index, layer in enumerate(self.net):
            if isinstance(layer, nn.LeakyReLU):
                # No convolution or actnorm needs its output for its gradient; a negative slope would need the input.
                x = F.leaky_relu(x, layer.negative_slope, inplace=layer.negative_slope >= 0)
            elif isinstance(layer, nn.Conv2d):
                norm = self._actnorm_behind(index)
                folded = norm is not None
                x = self._convolved(x, index, layer, norm) if folded else layer(x)
            elif not folded:
                x = layer(x)
        return x

    def _actnorm_behind(self, index: int) -> nf.flows.ActNorm | None:
        """Which can be folded into convolution ``index``."""
        following = self.net[index + 1] if index + 1 < len(self.net) else None
        if not isinstance(following, nf.utils.ActNorm):
            return None
        norm = following.actNorm
        return norm if is_set(self, f"actnorm {index + 1}", norm.data_dep_init_done) else None

    def _convolved(self, x: Tensor, index: int, conv: nn.Conv2d, norm: nf.flows.ActNorm) -> Tensor:
        parameters = [tensor for tensor in (conv.weight, conv.bias, norm.s, norm.t) if tensor is not None]
        weight, bias = cache_of(self).get(str(index), parameters, lambda: _folded(conv, norm))
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def is_plain(net: nf.nets.ConvNet2d) -> bool:
    """Whether nobody changed what its constructor builds: convolution, perhaps an actnorm, activation, and again."""
    kinds = [type(layer) for layer in net.net]
    names = "".join({nn.Conv2d: "c", nn.LeakyReLU: "a", nf.utils.ActNorm: "n"}.get(kind, "?") for kind in kinds)
    return all(part in ("c", "cn") for part in names.split("a")) and all(
        layer.padding_mode == "zeros" for layer in net.net if isinstance(layer, nn.Conv2d))


def _folded(conv: nn.Conv2d, norm: nf.flows.ActNorm) -> tuple[Tensor, Tensor]:
    """The convolution and e^s·x + t behind it as one."""
    scale, shift = torch.exp(norm.s.flatten()), norm.t.flatten()
    return conv.weight * scale[:, None, None, None], shift if conv.bias is None else conv.bias * scale + shift
