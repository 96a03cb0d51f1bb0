r"""How far off a result may be, and the comparison.

No constant fits every layer: a round trip loses what the layer amplifies. The limit is therefore measured, on the
layer's own functions in float64. Each parameter and input is moved by up to one rounding of the dtype under test
(relative, ±eps), separately for every call; a stable computation in that dtype is the exact one for data moved by a few
such roundings. The largest effect of four such moves, plus one rounding of the result itself, is the unit. Plain torch
(:mod:`hflow_fast.reference` under every layer of :mod:`hflow_fast.nn`, float32 and float64) stays within
:data:`PLAIN_TORCH` units, 3.5 at most over 30 seeds, and the tests hold it to that; a layer may be off twice as far,
which is the rule for everything in this package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._subject import Direction, Subject
from .weights import preserved

__all__ = ["PLAIN_TORCH", "assert_within", "limit_of", "moved"]

PLAIN_TORCH = 4.0
_MOVES = 4


def moved(subject: Subject, function: Direction, value: Tensor, eps: float,
          generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What ``function(value)`` becomes where every parameter and input is off by up to one rounding, ±eps."""
    def move(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, dtype=torch.float64, generator=generator).to(tensor.device)
        return tensor * (1 + eps * (2 * noise - 1)) if tensor.is_floating_point() else tensor

    context = subject.context
    with preserved(subject.module):
        for parameter in subject.module.parameters():
            parameter.copy_(move(parameter))
        subject.context = None if context is None else move(context)
        try:
            return subject.call(function, move(value))
        finally:
            subject.context = context


def limit_of(exact: Tensor, evaluate_moved: Callable[[], Tensor], eps: float) -> Tensor:
    """(B,): what every sample of a result of dtype eps may be off ``exact``, its value in float64."""
    effect = torch.stack([(evaluate_moved() - exact).abs() for _ in range(_MOVES)]).amax(0)
    return 2 * PLAIN_TORCH * (effect + eps * exact.abs()).reshape(len(exact), -1).amax(1)


def assert_within(what: str, got: Tensor, expected: Tensor, limit: Tensor, hint: str) -> None:
    """Fails where ``got`` (B, ...) is further from ``expected`` than ``limit`` (B,), or not a number."""
    difference = (got.double() - expected.double()).abs()
    allowed = limit.reshape(-1, *(1,) * (difference.dim() - 1)).expand_as(difference)
    wrong = ~(difference <= allowed)  # NaN is wrong
    if not wrong.any():
        return
    excess = torch.where(wrong, (difference / allowed).nan_to_num(torch.inf, torch.inf), 0)
    place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{what}: at index {place} got {got[place].item():.9g}, expected {expected[place].item():.9g}, off by "
        f"{difference[place].item():.3g} where {allowed[place].item():.3g} is allowed; "
        f"{int(wrong.sum())} of {wrong.numel()} values are wrong ({hint})"
    )
