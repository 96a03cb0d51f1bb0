"""The matrix exponential that makes rotations of free parameters."""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor

__all__ = ["Squarings", "skew_exponential"]

_POWERS = (1, 2, 3, 6)
# The series of degree 18 in five products: Bader, Blanes & Casas, "Computing the matrix exponential with an optimized
# Taylor polynomial approximation", Mathematics 7 (2019), Eq. 16: five combinations of I (its factors are _ON_IDENTITY)
# and of these powers.
_COMBINATIONS = (
    (-1.00365581030144618291e-01, -8.02924648241156932449e-03, -8.92138498045729985177e-04, 0.0),
    (3.97849749499645077844e-01, 1.36783778460411720168e00, 4.98289622525382669416e-01, -6.37898194594723280150e-04),
    (1.68015813878906206114e00, 5.71779846478865511061e-02, -6.98210122488052056106e-03, 3.34975017086070470649e-05),
    (-6.76404519071381882256e-02, 6.75961301770459654925e-02, 2.95552570429315521194e-02, -1.39180257516060693404e-05),
    (0.0, -9.23364619367118555360e-02, -1.69364939002081722752e-02, -1.40086798182036094347e-05),
)
_ON_IDENTITY = {2: -1.09676396052962061844e01, 3: -9.04316832390810593223e-02}

# Largest norm for the series, whose remainder is a relative change of the matrix below rounding (ibid., Table 1). What is
# planned for is lower, so that a matrix may grow between two looks at its norm.
_REACH = {torch.float32: 3.01, torch.float64: 1.09}
_PLANNED = 0.9
_SMALL = 64  # channels up to which float64 costs nothing beside the launches
_MOST_SQUARINGS = 17  # beyond, float32 has lost all digits of an angle, and the smallest factor underflows


class Squarings:
    """How often a stack of generators must be halved, and its exponential squared, remembered between calls.

    The number follows from the norm, which lies on the device. On a processor, and while gradients are off, it is read.
    In training on a GPU it is the one that the latest norm to have arrived asks for, with a tenth to spare; an
    exponential whose norm has outgrown it is NaN, never wrong, and a later call has the new norm.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def choose(self, bound: Tensor, dtype: torch.dtype) -> int:
        """The number for generators of 2-norm at most ``bound`` (0-dim).

        Raises:
            RuntimeError: none is known yet in a CUDA graph's capture, which cannot read one.
        """
        if bound.is_cuda and torch.cuda.is_current_stream_capturing():
            if self._number is None:
                raise RuntimeError("skew_exponential: evaluate the layer once before capturing it in a CUDA graph, so that "
                                   "the size of its matrices is known.")
        elif self._number is None or not bound.is_cuda or not torch.is_grad_enabled():
            self._number, self._arriving = _needed(float(bound), dtype), None
        else:
            if self._arriving is not None and self._arriving[1].query():
                self._number, self._arriving = _needed(float(self._arriving[0]), dtype), None
            if self._arriving is None:
                self._arriving = _send(bound)
        return self._number

    def __deepcopy__(self, memo: dict[int, Any]) -> Squarings:
        return Squarings()

    def __getstate__(self) -> dict[str, Any]:
        return {"_number": None, "_arriving": None}


def skew_exponential(generator: Tensor, squarings: Squarings | None = None) -> Tensor:
    """exp(A − Aᵀ): a rotation for any A; its inverse is its transpose.

    Scaling and squaring of the Taylor series of degree 18 (Moler & Van Loan, SIAM Review 2003, method 3), differentiated
    step by step, where torch.matrix_exp's gradient takes an exponential of twice the size. A skew matrix S is normal, so
    its 2-norm, which sets the scaling, is far below its 1-norm for large random matrices, and close to a bound by the
    moments of S⁶: fewer squarings, less rounding. Matrix products are IEEE ones in both passes, whatever the program
    allows elsewhere: rotations of TF32 are off by a tenth.

    Args:
        generator: A, (…, C, C). A stack is one batched call. Half precision is computed in float32, and up to 64 channels
            everything is computed in float64 and rounded once.
        squarings: what is remembered between calls with the same parameter; with it, training does not wait for the
            device. None reads the norm.

    Returns:
        (…, C, C). NaN where some of A is not finite, or its norm is above 10⁵ or has outgrown ``squarings``.
    """
    with torch.autocast(generator.device.type, enabled=False):
        if generator.dtype in (torch.bfloat16, torch.float16):
            generator = generator.float()
        skew = generator - generator.mT
        if torch.compiler.is_compiling():  # the number of squarings depends on the data
            return torch.matrix_exp(skew)
        if skew.numel() <= math.prod(skew.shape[:-2]):  # nothing, or one channel
            return torch.exp(skew)
        stack = skew.reshape(-1, *skew.shape[-2:])
        if stack.shape[-1] <= _SMALL:
            stack = stack.double()
        return _Exponential.apply(stack, squarings or Squarings()).to(skew.dtype).view(skew.shape)


class _Exponential(torch.autograd.Function):
    """exp(S) of skew S (N, C, C). Its own function, so that the backward pass has IEEE products too."""

    @staticmethod
    def forward(ctx: Any, skew: Tensor, squarings: Squarings) -> Tensor:
        with _ieee_products():
            powers = _powers(skew)
            bound = _norm_bound(powers[-1])
            ctx.squarings = squarings.choose(bound, skew.dtype)
            factors = _factors(ctx.squarings, skew.dtype, skew.device)
            # Out of reach, the factors are NaN and with them the result, without asking the device.
            limit = _REACH[skew.dtype] * 2.0**ctx.squarings
            factors = torch.where(bound <= limit, factors, math.nan)
            combinations, ninth, roots = _roots(powers, factors, ctx.squarings)
            rotation = _orthogonalized(roots[-1])
        ctx.save_for_backward(skew, factors, combinations, ninth, *powers[1:], *roots[:-1])
        return rotation

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        skew, factors, combinations, ninth, second, third, sixth, *roots = ctx.saved_tensors
        with _ieee_products():
            if torch.is_grad_enabled():  # for second derivatives: the same value, as a function of S
                result = _roots(_powers(skew), factors, ctx.squarings)[2][-1]
                return torch.autograd.grad(result, skew, gradient, create_graph=True)[0], None
            for root in reversed(roots):
                gradient = _both_sides(root, gradient)
            of_outer = gradient @ ninth.mT
            of_ninth = torch.baddbmm(of_outer, (combinations[2] + ninth).mT, gradient)
            of_combinations = torch.stack([of_ninth @ combinations[4].mT, gradient, of_outer, of_ninth,
                                           combinations[0].mT @ of_ninth])
            of_first, of_second, of_third, of_sixth = _mix(factors.mT, of_combinations)
            # Even powers stay symmetric and odd ones skew, so that only this part of their gradients counts, and
            # H·S + S·H for a symmetric H is one product less its transpose.
            half = (of_sixth + of_sixth.mT) @ third
            of_third = (of_third - of_third.mT).sub_(half).add_(half.mT).mul_(0.5)
            of_second.baddbmm_(of_third, skew, alpha=-1.0)
            of_first.baddbmm_(second, of_third)
            half = (of_second + of_second.mT) @ skew
            return of_first.sub_(half, alpha=0.5).add_(half.mT, alpha=0.5), None


def _powers(skew: Tensor) -> tuple[Tensor, ...]:
    second = skew @ skew
    third = second @ skew
    return skew, second, third, third @ third


def _roots(powers: tuple[Tensor, ...], factors: Tensor, squarings: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The five combinations, the product of degree 9, and exp(S/2^squarings) with its squares up to exp(S)."""
    combinations = _mix(factors, torch.stack(powers))
    for index, factor in _ON_IDENTITY.items():
        combinations[index].diagonal(dim1=-2, dim2=-1).add_(factor)
    ninth = torch.baddbmm(combinations[3], combinations[0], combinations[4])
    roots = [torch.baddbmm(combinations[1], combinations[2] + ninth, ninth)]
    for _ in range(squarings):
        roots.append(roots[-1] @ roots[-1])
    return combinations, ninth, roots


def _orthogonalized(rotation: Tensor) -> Tensor:
    """A step of Newton & Schulz towards RᵀR = I, since R's log-det is taken to be exactly 0.

    Each squaring doubles what rounding left over; this squares it. To first order it changes nothing along rotations, so
    gradients pass it by.
    """
    return torch.baddbmm(rotation, rotation, rotation.mT @ rotation, beta=1.5, alpha=-0.5)


def _both_sides(matrix: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of M in M², given that of M²."""
    return (gradient @ matrix.mT).baddbmm_(matrix.mT, gradient)


def _mix(factors: Tensor, stack: Tensor) -> Tensor:
    """Linear combinations (M, N, C, C) of a stack (K, N, C, C), in one pass."""
    return (factors @ stack.flatten(1)).view(-1, *stack.shape[1:])


def _norm_bound(sixth: Tensor) -> Tensor:
    """An upper bound of the 2-norms of skew S (N, C, C), C ≥ 2, given S⁶. 0-dim, float64, without gradient.

    −S⁶ has no negative eigenvalue, and each positive one twice; so the largest is at most μ + σ·√((C − 2)/2), where μ
    and σ² are the eigenvalues' mean and variance (Wolkowicz & Styan, 1980). For random matrices 1.2 times the norm.
    """
    sixth, size = sixth.detach().double(), sixth.shape[-1]
    mean = -sixth.diagonal(dim1=-2, dim2=-1).mean(-1)
    variance = (sixth.square().sum((-2, -1)) / size - mean.square()).clamp_min(0.0)
    return (mean + (variance * (size / 2 - 1)).sqrt()).amax().clamp_min(0.0) ** (1 / 6)


def _needed(bound: float, dtype: torch.dtype) -> int:
    if not 0.0 < bound < math.inf:
        return 0
    return min(max(0, math.ceil(math.log2(bound / (_PLANNED * _REACH[dtype])))), _MOST_SQUARINGS)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _factors(squarings: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """_COMBINATIONS for S/2^squarings in terms of the powers of S. Kept on the device: copying there would wait for it."""
    scales = [0.5 ** (squarings * power) for power in _POWERS]
    rows = [[value * scale for value, scale in zip(row, scales)] for row in _COMBINATIONS]
    return torch.tensor(rows, dtype=dtype, device=device)


def _send(bound: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    host = torch.empty((), dtype=bound.dtype, pin_memory=True)
    host.copy_(bound, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Matrix products in full float32, on GPUs (no TF32) and processors (no bfloat16 passes)."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
