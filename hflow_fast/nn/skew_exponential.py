"""The matrix exponential that makes rotations of free parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["skew_exponential"]

_COEFFICIENTS = [1.0 / math.factorial(power) for power in range(17)]
# Largest norm for the series: its remainder, norm¹⁷/17!, stays below rounding even when squarings multiply it by 2⁸.
_REACH = {torch.float32: 2.0, torch.float64: 0.5}


def skew_exponential(generator: Tensor) -> Tensor:
    """exp(A − Aᵀ): a rotation for any A; its inverse is its transpose.

    Scaling and squaring of the Taylor series of degree 16 (Moler & Van Loan, SIAM Review 2003, method 3), differentiated
    step by step, where torch.matrix_exp's gradient takes an exponential of twice the size. A skew matrix S is normal, so
    its 2-norm is at most ‖S⁴‖₁^¼, a far closer bound than ‖S‖₁ for large random matrices: fewer squarings, less rounding.

    Args:
        generator: A, (…, C, C), float32 or float64; half precision is computed in float32.

    Returns:
        (…, C, C). NaN where some of A is not finite.
    """
    with torch.autocast(generator.device.type, enabled=False):
        if generator.dtype in (torch.bfloat16, torch.float16):
            generator = generator.float()
        skew = generator - generator.mT
        if torch.compiler.is_compiling():  # the number of squarings depends on the data
            return torch.matrix_exp(skew)
        if not skew.numel():
            return skew
        return _exponential(skew)


def _exponential(skew: Tensor) -> Tensor:
    second = skew @ skew
    fourth = second @ second
    bound = float(fourth.detach().abs().sum(dim=-2).amax()) ** 0.25
    if not math.isfinite(bound):
        return skew * math.nan
    squarings = max(0, math.ceil(math.log2(bound / _REACH[skew.dtype]))) if bound else 0
    scale = 0.5**squarings
    first, second, fourth = skew * scale, second * scale**2, fourth * scale**4
    third = second @ first
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)

    def cubic(lowest: int) -> Tensor:
        zeroth, *rest = _COEFFICIENTS[lowest : lowest + 4]
        return zeroth * identity + rest[0] * first + rest[1] * second + rest[2] * third

    # Paterson & Stockmeyer: a polynomial in S⁴ whose coefficients are cubics in S.
    result = cubic(12) + _COEFFICIENTS[16] * fourth
    for lowest in (8, 4, 0):
        result = cubic(lowest) + result @ fourth
    for _ in range(squarings):
        result = result @ result
    return result
