"""Round trips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._subject import Subject
from ._tolerance import assert_within, limit_of, moved

__all__ = ["assert_invertible"]


@torch.no_grad()
def assert_invertible(
    layer: Any,
    shape: Sequence[int],
    *,
    context: Tensor | None = None,
    x: Tensor | None = None,
    module: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    seeds: Iterable[int] = range(3),
    randomized: bool = True,
    tolerance: float | None = None,
) -> None:
    r"""Assert that ``layer.inverse`` undoes ``layer``, and ``layer`` its inverse, and that their log-dets say so.

    For every seed, on weights that :func:`randomize` made after a first call in either direction (for data-dependent
    initialisation; and a cached inverse has to notice the change) and on standard normal data:

    1. log-dets are (B,), of ``dtype`` or, for half precision, float32; both outputs are of ``dtype``;
    2. inverse(layer(x)) is x, and layer(inverse(z)) is z for z = layer(x);
    3. log_det of the inverse at z is −log_det at x.

    A layer with random parts, such as dropout, should be in the mode in which it is invertible. It leaves as it came:
    weights, buffers, attributes.

    Args:
        layer: Called as ``z, log_det = layer(x)`` and ``x, log_det = layer.inverse(z)``, with the context as second
            argument where there is one. Or a pair ``(forward, inverse)`` of functions called so, to adapt another
            signature.
        shape: (B, C, ...) of x.
        context: Second argument of both directions.
        x: A batch to use instead of normal data, for layers that take some values only.
        module: Whose weights to randomize, where ``layer`` is a pair of functions of it.
        dtype: What to test in; the module, x and context are converted.
        seeds: Of weights and data.
        randomized: False tests the weights as they are.
        tolerance: Largest ``|difference| / (1 + |expected|)``. By default the limit follows from rounding: each
            parameter and input, moved by one rounding of ``dtype``, moves the results in float64 by so much; plain
            torch stays within 4 times the largest such effect, and the limit is twice that
            (``hflow_fast/testing/_tolerance.py`` has the details).

    Raises:
        AssertionError: Something differs; the text says what, where, by how much and for which seed.
        ValueError: An argument does not fit.

    Example:
        >>> import math
        >>> from hflow_fast.nn import ActNorm, InvConv1x1, Sequential
        >>> assert_invertible(Sequential(ActNorm(4), InvConv1x1(4)), (2, 4, 3, 3))

        Another signature, here FrEIA's, and what a failure says:

        >>> class Tripling(nn.Module):
        ...     def forward(self, x, rev=False):
        ...         log_det = torch.full((len(x[0]),), 3 * math.log(3))
        ...         return ((x[0] / 3,), -log_det) if rev else ((x[0] * 3,), log_det)
        >>> module = Tripling()
        >>> def forward(x):
        ...     (z,), log_det = module((x,))
        ...     return z, log_det
        >>> def inverse(z):
        ...     (x,), log_det = module((z,), rev=True)
        ...     return x, log_det
        >>> assert_invertible((forward, inverse), (2, 3), module=module)
        >>> assert_invertible((forward, forward), (2, 3), module=module)
        Traceback (most recent call last):
        AssertionError: inverse(layer(x)): at index ... got ..., expected ..., off by ... where ... is allowed; 6 of 6
        values are wrong (seed 0, torch.float32)
    """
    for seed in seeds:
        subject = Subject(layer, module, shape, x, context, dtype, seed)
        with subject.prepared(randomized):
            _check(subject, tolerance)


def _check(subject: Subject, tolerance: float | None) -> None:
    x, forward, inverse, hint = subject.x, subject.forward, subject.inverse, subject.hint
    z, log_det = subject.call(forward, x)
    x_again, log_det_inverse = subject.call(inverse, z)
    if x_again.shape != x.shape:
        raise AssertionError(f"inverse(layer(x)) has shape {tuple(x_again.shape)}, x has {tuple(x.shape)} ({hint})")
    z_again, _ = subject.call(forward, x_again)
    limits = _limits(subject) if tolerance is None else [
        tolerance * (1 + value.double().abs().flatten(1).amax(1)) for value in (x, z, log_det[:, None])]
    assert_within("inverse(layer(x))", x_again, x, limits[0], hint)
    assert_within("layer(inverse(z))", z_again, z, limits[1], hint)
    assert_within("log_det of the inverse, against minus that of the layer,", log_det_inverse, -log_det, limits[2],
                  hint)


def _limits(subject: Subject) -> list[Tensor]:
    """Of x, z and log_det, each (B,)."""
    eps = torch.finfo(subject.x.dtype).eps
    generator = torch.Generator().manual_seed(0)
    with subject.exact():
        x, forward, inverse = subject.x, subject.forward, subject.inverse

        def there() -> Tensor:
            return moved(subject, forward, x, eps, generator)[0]

        def there_and_back() -> Tensor:
            return moved(subject, inverse, there(), eps, generator)[0]

        z, log_det = subject.call(forward, x)
        x_again, log_det_inverse = subject.call(inverse, z)
        z_again, _ = subject.call(forward, x_again)
        return [
            limit_of(x_again, there_and_back, eps),
            limit_of(z_again, lambda: moved(subject, forward, there_and_back(), eps, generator)[0], eps),
            limit_of(log_det, lambda: moved(subject, forward, x, eps, generator)[1], eps)
            + limit_of(log_det_inverse, lambda: moved(subject, inverse, there(), eps, generator)[1], eps),
        ]
