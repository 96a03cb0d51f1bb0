"""The log-determinant against autograd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._subject import Subject
from ._tolerance import assert_within, limit_of, moved
from .weights import preserved

__all__ = ["assert_log_det"]

_MOST_ELEMENTS = 4096  # of a sample: its Jacobian has the square of this


def assert_log_det(
    layer: Any,
    shape: Sequence[int],
    *,
    context: Tensor | None = None,
    x: Tensor | None = None,
    module: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    seeds: Iterable[int] = range(3),
    randomized: bool = True,
    independent: bool = True,
    tolerance: float | None = None,
) -> None:
    r"""Assert that ``layer``'s log-det is that of its Jacobian, sample by sample, and that its gradient belongs to it.

    The Jacobian :math:`\partial z_b / \partial x_b` comes from autograd in float64, at the very values that ``dtype``
    holds. Weights, data and what is left behind are as in :func:`assert_invertible`. Use small shapes: a sample of n
    elements takes n backward passes.

    Args:
        layer: As in :func:`assert_invertible`; a forward function alone will do. To test the log-det of the inverse,
            give ``layer.inverse``, and the layer as ``module``.
        independent: Also assert that no sample depends on another. False allows it (batch statistics).
        shape, context, x, module, dtype, seeds, randomized, tolerance: As in :func:`assert_invertible`.

    Raises:
        AssertionError: Something differs; the text says what, where, by how much and for which seed.
        ValueError: An argument does not fit.

    Example:
        >>> from hflow_fast.nn import AffineCoupling, InvConv1x1
        >>> assert_log_det(AffineCoupling(nn.Conv2d(2, 4, 3, padding=1)), (2, 4, 3, 3))
        >>> layer = InvConv1x1(4)
        >>> assert_log_det(layer.inverse, (2, 4, 3, 3), module=layer)
        >>> assert_log_det(lambda x: (2 * x, torch.ones(len(x))), (2, 1))
        Traceback (most recent call last):
        AssertionError: log_det, against log|det| of the Jacobian,: at index (0,) got 1, expected 0.693...
    """
    for seed in seeds:
        subject = Subject(layer, module, shape, x, context, dtype, seed)
        if subject.x[0].numel() > _MOST_ELEMENTS:
            raise ValueError(f"hflow_fast.testing: a Jacobian of shape {tuple(shape)} is too large; give samples of at "
                             f"most {_MOST_ELEMENTS} elements")
        with subject.prepared(randomized):
            _check(subject, independent, tolerance)


def _check(subject: Subject, independent: bool, tolerance: float | None) -> None:
    with torch.no_grad():
        log_det = subject.call(subject.forward, subject.x)[1]
    eps, generator = torch.finfo(subject.x.dtype).eps, torch.Generator().manual_seed(0)
    with subject.exact():
        jacobians = _jacobians(subject, independent)
        expected = _log_abs_det(jacobians)
        with torch.no_grad():
            exact = subject.call(subject.forward, subject.x)[1]
            limit = limit_of(exact, lambda: moved(subject, subject.forward, subject.x, eps, generator)[1], eps)
        limit = limit + _limit_of_factorisation(jacobians, expected)
        if tolerance is not None:
            limit = tolerance * (1 + expected.abs())
        assert_within("log_det, against log|det| of the Jacobian,", log_det, expected, limit, subject.hint)
        _check_gradient(subject)


def _jacobians(subject: Subject, independent: bool) -> Tensor:
    """(B, n, n), n the elements of a sample."""
    x = subject.x.clone().requires_grad_()
    z = subject.call(subject.forward, x)[0].flatten(1)
    samples, elements = z.shape
    jacobians = z.new_empty(samples, elements, elements)
    for b in range(samples):
        for i in range(elements):
            (gradient,) = torch.autograd.grad(z[b, i], x, retain_graph=True, materialize_grads=True)
            gradient = gradient.flatten(1)
            jacobians[b, i] = gradient[b]
            others = gradient.abs().amax(1)
            others[b] = 0
            if independent and others.any():
                raise AssertionError(f"layer(x): sample {b} depends on sample {int(others.argmax())}, so that log_det "
                                     f"is not one value per sample; independent=False allows it ({subject.hint})")
    return jacobians


def _check_gradient(subject: Subject) -> None:
    """The slope of log_det along a random direction of data and weights, beside what autograd says it is.

    Values cannot show a log-det that is cut from the graph, or part of it; training would.
    """
    subject.x = subject.x.clone().requires_grad_()
    leaves = [subject.x, *(p for p in subject.module.parameters() if p.requires_grad)]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(leaf.shape, dtype=torch.float64, generator=generator).to(leaf.device) for leaf in leaves]
    log_det = subject.call(subject.forward, subject.x)[1]
    slope = torch.zeros_like(log_det)
    if log_det.requires_grad:
        for b in range(len(log_det)):
            gradients = torch.autograd.grad(log_det[b], leaves, retain_graph=True, materialize_grads=True)
            slope[b] = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step = torch.finfo(torch.float64).eps ** (1 / 3)  # where truncation and cancellation cost the same
    with torch.no_grad(), preserved(subject.module):
        values = []
        for sign in (1, -2):  # to +step, then on to −step
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=sign * step)
            values.append(subject.call(subject.forward, subject.x)[1])
    expected = (values[0] - values[1]) / (2 * step)
    # Both costs are about step² of what is differentiated; a missing term is of the size of the slope itself.
    limit = step * (1 + log_det.detach().abs() + expected.abs())
    assert_within("the derivative of log_det by autograd, against finite differences,", slope, expected, limit,
                  subject.hint)


def _log_abs_det(matrices: Tensor) -> Tensor:
    """log|det| of each matrix, one by one: of a stack of large ones, torch 2.13's are wrong on several CPU threads."""
    return torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in matrices])


def _limit_of_factorisation(jacobians: Tensor, log_det: Tensor) -> Tensor:
    """What slogdet may be off: it is exact for a matrix whose entries are off by about n roundings.

    The n factors of a determinant round, too: where they are of size one, log|det| is near zero and its own size says
    nothing.
    """
    n, eps, generator = jacobians.shape[-1], torch.finfo(torch.float64).eps, torch.Generator().manual_seed(0)

    def moved_log_det() -> Tensor:
        noise = 2 * torch.rand(jacobians.shape, dtype=torch.float64, generator=generator) - 1
        return _log_abs_det(jacobians * (1 + n * eps * noise.to(jacobians.device)))

    return limit_of(log_det, moved_log_det, eps) + n * eps
