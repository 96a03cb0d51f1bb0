"""In which arithmetic the networks of models compute; flow variables are float32 or better in all of them.

A network in bfloat16 is a staircase: inputs that differ in their last float32 bit now and then round to different
bfloat16 values, here or in any layer behind, and then the scales and shifts differ by bfloat16's 0.4 %. Inverting a
coupling in float32 brings its passive half back to the last bit or two, not exactly, so after a few dozen steps an
image decoded from its latents carries noise of bfloat16's size. Finer inputs to a network do not help, since every
layer rounds. With flow variables in float64, what the networks see comes back 10⁹ times closer than the stairs are
wide: the networks return the same bits in both directions, and decoding is as exact as can be. So encoding has float64
flow variables, and latents, wherever the networks are coarser than float32; they are a small part of the work. Training
and sampling invert nothing and keep float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._processor import CONVOLVES_CHANNELS_LAST, HAS_BFLOAT16
from ..ops._conv3x3 import conv3x3, is_quick
from ..ops._conv_act import conv_act, is_fusible, pays

__all__ = [
    "PRECISIONS", "Activation", "NetworkForm", "Precision", "activate", "choose", "conv2d", "convolution_adds_bias",
    "defaults", "linear", "widen",
]

Precision = Literal["fp32", "tf32", "bf16"]
Activation = Literal["leaky_relu", "relu", "tanh", "linear"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


class NetworkForm(NamedTuple):
    """The form in which networks take weights and hand on features."""

    dtype: torch.dtype | None = None
    """None: that of the parameters."""
    channels_last: bool = False

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors in this form: those that are so themselves, of the others copies made in few launches."""
        result = list(tensors)
        others = [place for place, tensor in enumerate(tensors) if not self._is_of(tensor)]
        for place in others:
            result[place] = torch.empty_like(tensors[place], dtype=self.dtype,
                                             memory_format=self._memory_format(tensors[place]))
        if others:
            torch._foreach_copy_([result[place] for place in others], [tensors[place] for place in others])
        return result

    def of_one(self, tensor: Tensor) -> Tensor:
        """A tensor in this form, differentiably."""
        return tensor.to(self.dtype or tensor.dtype, memory_format=self._memory_format(tensor))

    def laid_out(self, x: Tensor) -> Tensor:
        """A flow variable (B, C, H, W) in this memory format; its dtype stays."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def _is_of(self, tensor: Tensor) -> bool:
        memory_format = self._memory_format(tensor)
        return self.dtype in (None, tensor.dtype) and (
            memory_format is torch.preserve_format or tensor.is_contiguous(memory_format=memory_format))

    def _memory_format(self, tensor: Tensor) -> torch.memory_format:
        last = self.channels_last and tensor.dim() == 4
        return torch.channels_last if last else torch.preserve_format


def defaults(
    device: torch.device, precision: Precision | None = None, many_3x3: bool = False
) -> tuple[Precision, bool]:
    """The precision of a device, and whether features are channels_last.

    They are in bfloat16; in a GPU's tf32, whose tensor cores want it; on processors with AVX-512, whose convolutions it
    makes quicker in both directions (with AVX2 PyTorch's become slower in the backward pass); and where a model has
    ``many_3x3`` convolutions for our kernel, which reads nothing else.
    """
    precision = precision or ("tf32" if device.type == "cuda" else "fp32")
    if device.type == "cuda":
        return precision, precision != "fp32"
    return precision, precision == "bf16" or CONVOLVES_CHANNELS_LAST or (many_3x3 and is_quick())


def choose(
    model: nn.Module, precision: Precision | None, channels_last: bool | None, many_3x3: bool = False
) -> tuple[Precision, NetworkForm]:
    """What a model's ``set_precision`` does with its arguments: the precision, and the form of its networks.

    It sets whether convolutions of the whole process may be tf32, and gives the parameters the form's memory format,
    so that they need not be turned round in every pass.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"{type(model).__name__}.set_precision: {precision!r} is none of {', '.join(PRECISIONS)}.")
    precision, by_default = defaults(next(model.parameters()).device, precision, many_3x3)
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    form = NetworkForm(torch.bfloat16 if precision == "bf16" else None,
                       by_default if channels_last is None else channels_last)
    model.to(memory_format=torch.channels_last if form.channels_last else torch.contiguous_format)
    return precision, form


def widen(x: Tensor) -> Tensor:
    """``x`` in float32 or better: what leaves a network for the flow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int = 1,
           activation: Activation = "linear", slope: float = 0.0) -> Tensor:
    """:func:`torch.nn.functional.conv2d` and an activation, by whatever is quickest, also without bfloat16 instructions.

    Args:
        activation: "leaky_relu" of negative ``slope``, "relu", "tanh", or "linear", which is none.
    """
    if _lacks_bfloat16(x):
        bias = None if bias is None else bias.float()
        return conv2d(x.float(), weight.float(), bias, padding, groups, activation, slope).to(x.dtype)
    if bias is not None and is_fusible(x, weight, bias):
        if pays(x, weight):
            return conv_act(x, weight, bias, padding, groups, activation, slope)
        y = conv_act(x, weight, bias, padding, groups, "linear", slope)
    elif weight.shape[2:] == (3, 3) and padding == 1 and bias is not None:
        y = conv3x3(x, weight, bias, groups=groups)
    else:
        y = F.conv2d(x, weight, bias, padding=padding, groups=groups)
    return activate(y, activation, slope)


def activate(x: Tensor, activation: Activation, slope: float = 0.0) -> Tensor:
    """In place, on the fresh output of a convolution or product, which nothing else needs: half the memory."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, slope, inplace=True)
    if activation == "relu":
        return torch.relu_(x)
    return torch.tanh_(x) if activation == "tanh" else x


def convolution_adds_bias(x: Tensor) -> bool:
    """Whether a bias costs a convolution nothing: oneDNN adds it in place, cuDNN leaves it to another pass."""
    return x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`torch.nn.functional.linear`, also where bfloat16 has no instructions."""
    if _lacks_bfloat16(x):
        return F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def _lacks_bfloat16(x: Tensor) -> bool:
    """Whether PyTorch would take a loop 10 to 40 times slower than float32, where it rounds no differently: products
    of bfloat16 are exact in float32, in which both add up."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not HAS_BFLOAT16
