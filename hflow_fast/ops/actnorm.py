"""Per-channel affine transform."""

from __future__ import annotations

import torch

from hflow_fast import reference
from hflow_fast._checks import check_channels, check_flow_variable, compute_dtype
from hflow_fast._extension import has_kernel
from hflow_fast.ops._registration import empty_like_in, format_of, register

__all__ = ["actnorm"]


def actnorm(
    x: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Scale and shift every channel.

    .. math:: y_c = x_c\, e^{s_c} + b_c \qquad\text{inverse: } y_c = (x_c - b_c)\, e^{-s_c}

    The activation normalisation of Glow (Kingma and Dhariwal, 2018, section 3.1); its data-dependent initialisation
    is :class:`hflow_fast.nn.ActNorm`'s business.

    Args:
        x: (B, C), (B, C, L) or (B, C, H, W); contiguous and channels_last are read as they are, other strides are made
            contiguous. float32, float64, bfloat16 or float16.
        log_scale: (C,), the natural logarithm of the scale; any of these dtypes.
        bias: (C,), in units of y (forward) or x (inverse); any of these dtypes.
        inverse: Apply the inverse.

    Returns:
        ``(y, log_det)``: y like x, in its memory format; log_det (B,), in nats, of the evaluated direction
        (±H·W·Σ log_scale), float32, or float64 for float64 x.

    Raises:
        ValueError: A shape, dtype or device does not fit; the text names the argument and what it got.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> y, log_det = actnorm(x, torch.full((3,), 0.5), torch.zeros(3))
        >>> log_det
        tensor([24., 24.])
    """
    if not has_kernel("actnorm", x.device):
        return reference.actnorm(x, log_scale, bias, inverse=inverse)
    return _kernel(x, log_scale, bias, inverse)


def _fake(
    x: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    check_flow_variable("actnorm", x)
    check_channels("actnorm", x, (x.shape[1],), log_scale=log_scale, bias=bias)
    return empty_like_in(x, format_of(x)), x.new_empty(x.shape[0], dtype=compute_dtype(x))


_kernel = register("actnorm", 3, _fake)
