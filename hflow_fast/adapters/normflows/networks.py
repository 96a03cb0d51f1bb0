"""The coupling network of normflows' Glow."""

from __future__ import annotations

import normflows as nf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._state import is_set
from ..networks import in_quickest_order

__all__ = ["ConvNet2d", "is_plain"]


class ConvNet2d(nf.nets.ConvNet2d):
    """Activations overwrite what they are of, and actnorms are folded into the convolutions before them.

    On processors with AVX-512 activations are channels_last inside, the order that their convolutions compute in.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → raw parameters of a coupling."""
        return in_quickest_order(self._activated, x)

    def _activated(self, x: Tensor) -> Tensor:
        folded = False
        layers = list(self.net)
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.LeakyReLU):
                # No convolution or actnorm needs its output for its gradient; a negative slope would need the input.
                x = F.leaky_relu(x, layer.negative_slope, inplace=layer.negative_slope >= 0)
            elif isinstance(layer, nn.Conv2d):
                norm = self._foldable(index, layers[index + 1:])
                folded = norm is not None
                x = _convolved(x, layer, norm) if folded else layer(x)
            elif not folded:
                x = layer(x)
        return x

    def _foldable(self, index: int, following: list[nn.Module]) -> nf.flows.ActNorm | None:
        """The actnorm behind convolution ``index``, if there is one and it is initialised."""
        if not following or not isinstance(following[0], nf.utils.ActNorm):
            return None
        norm = following[0].actNorm
        return norm if is_set(self, f"actnorm {index}", norm.data_dep_init_done) else None


def is_plain(net: nf.nets.ConvNet2d) -> bool:
    """Whether nobody changed what its constructor builds: convolution, perhaps an actnorm, activation, and again."""
    kinds = [type(layer) for layer in net.net]
    names = "".join({nn.Conv2d: "c", nn.LeakyReLU: "a", nf.utils.ActNorm: "n"}.get(kind, "?") for kind in kinds)
    return all(part in ("c", "cn") for part in names.split("a")) and all(
        layer.padding_mode == "zeros" for layer in net.net if isinstance(layer, nn.Conv2d))


def _convolved(x: Tensor, conv: nn.Conv2d, norm: nf.flows.ActNorm) -> Tensor:
    """The convolution and e^s·x + t behind it, as one."""
    scale, bias = torch.exp(norm.s.flatten()), norm.t.flatten()
    if conv.bias is not None:
        bias = conv.bias * scale + bias
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
