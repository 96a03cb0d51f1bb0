"""Instance normalisation with the unbiased variance."""

from __future__ import annotations

import torch

from hflow_fast import reference
from hflow_fast._checks import check_instance_norm
from hflow_fast._extension import has_kernel
from hflow_fast.ops._registration import empty_like_in, format_of, register

__all__ = ["instance_norm"]


def instance_norm(x: torch.Tensor, *, epsilon: float = 1e-6) -> torch.Tensor:
    r"""Zero mean and unit **unbiased** variance over the pixels of each channel of each sample.

    .. math:: y = \frac{x - \bar x}{\sqrt{v + \varepsilon}}, \qquad v = \frac{1}{n-1} \sum (x - \bar x)^2

    Where there is a single pixel, over its channels. Unlike :func:`torch.nn.functional.instance_norm`, whose variance
    is biased; HFlow's networks have this one.

    Args:
        x: (B, C), (B, C, L) or (B, C, H, W), with more than one pixel, or more than one channel of a single pixel;
            contiguous and channels_last are read as they are, other strides are made contiguous. float32, float64,
            bfloat16 or float16.
        epsilon: Added to the variance, above 0.

    Returns:
        Like x, in its dtype (also under autocast) and memory format; mean and variance are float32 or better, float64
        for float64 x.

    Raises:
        ValueError: There is nothing to normalise over, or an argument does not fit; the text says what it got.

    Example:
        >>> instance_norm(torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[-1.0000,  0.0000,  1.0000]]])
    """
    if not has_kernel("instance_norm", x.device):
        return reference.instance_norm(x, epsilon=epsilon)
    return _kernel(x, epsilon)


def _fake(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    check_instance_norm(x, epsilon)
    return empty_like_in(x, format_of(x))


_kernel = register("instance_norm", 1, _fake, autocast=False)
