"""From one image to another through the latents."""

from __future__ import annotations

from typing import Iterable, Iterator, Literal, Sequence

import torch
from torch import Tensor, nn

from ..data import from_uint8, to_uint8
from .labels import Labels, label_tensors

__all__ = ["Mode", "Space", "interpolate", "latents_of", "mix", "there_and_back"]

Mode = Literal["lerp", "slerp"]
Space = Literal["z", "y"]

_SMALLEST_SINE = 1e-4


@torch.no_grad()
def latents_of(model: nn.Module, images: Tensor, labels: Labels = None) -> list[Tensor]:
    """The latents of 8-bit images (N, 3, R, R), each pixel taken in the middle of what its value stands for.

    Args:
        model: a flow, such as an HFlow or a Glow.
        images: (N, 3, R, R), uint8.
        labels: for a class-conditional model: one class for all images, or one for each.
    """
    x = from_uint8(images).to(next(model.parameters()))
    return model.encode(x, *label_tensors(model, labels, len(x)))[0]


def mix(start: Sequence[Tensor], end: Sequence[Tensor], fraction: float, mode: Mode = "lerp") -> list[Tensor]:
    r"""Latents on the way from ``start`` (fraction 0) to ``end`` (fraction 1), each pair of tensors by itself.

    .. math:: \mathrm{lerp}: (1 - t)\,a + t\,b, \qquad
              \mathrm{slerp}: \frac{\sin((1 - t)\,\theta)}{\sin\theta}\,a + \frac{\sin(t\,\theta)}{\sin\theta}\,b

    θ is the angle between a and b, one per sample. The straight way is shorter, so that images on it look like samples
    of a smaller std; slerp keeps the distance from zero. Where a and b point the same way, or opposite ways, slerp is
    lerp.

    Source of slerp: Shoemake, "Animating rotation with quaternion curves", 1985.

    Args:
        start, end: as many tensors (B, …), of the same shapes.
        fraction: t, 0 to 1.
        mode: "lerp" or "slerp".

    Returns:
        Tensors of the same shapes and dtype; exactly ``start`` and ``end`` at 0 and 1.

    Raises:
        ValueError: another mode.
    """
    if mode not in ("lerp", "slerp"):
        raise ValueError(f'mix: mode must be "lerp" or "slerp", got {mode!r}.')
    return [_mix_pair(a, b, fraction, mode) for a, b in zip(start, end, strict=True)]


@torch.no_grad()
def interpolate(
    model: nn.Module,
    start: Sequence[Tensor],
    end: Sequence[Tensor],
    frames: int,
    *,
    mode: Mode = "lerp",
    space: Space = "z",
    batch_size: int = 16,
    labels: Labels = None,
) -> Iterator[Tensor]:
    """Images on the way from ``start`` to ``end``, at equal steps; the first and last are those of the ends.

    Args:
        model: a flow, such as an HFlow or a Glow.
        start, end: latents of B images each, as ``model.encode`` and :func:`~hflow_fast.inference.draw_latents`
            give them.
        frames: how many, at least 2.
        mode: see :func:`mix`.
        space: "z" mixes all latents; "y" takes the code that the endblock makes of its latent instead of the latent,
            and the finer latents as before.
        batch_size: images at a time; ``frames`` may be any number.
        labels: for a class-conditional model: one class for all, or one for each of the B, under which the ends were
            encoded.

    Yields:
        (B, 3, R, R), uint8, on the CPU.

    Raises:
        ValueError: fewer than 2 frames, another space, or "y" for a model without an endblock.
    """
    if frames < 2:
        raise ValueError(f"interpolate: frames must be at least 2, got {frames}.")
    if space not in ("z", "y"):
        raise ValueError(f'interpolate: space must be "z" or "y", got {space!r}.')
    endblock = getattr(model, "endblock", None)
    if space == "y":
        if endblock is None:
            raise ValueError(f'interpolate: {type(model).__name__} has no endblock; use space "z".')
        start, end = ([*latents[:-1], endblock.decode(latents[-1])[0]] for latents in (start, end))
    classes = label_tensors(model, labels, len(start[0]))
    together = max(1, batch_size // len(start[0]))
    for first in range(0, frames, together):
        steps = range(first, min(first + together, frames))
        mixed = [torch.cat(parts) for parts in zip(*(mix(start, end, step / (frames - 1), mode) for step in steps))]
        if space == "y":
            mixed[-1] = endblock.encode(mixed[-1])[0]
        images, _ = model.decode(mixed, *(each.repeat(len(steps)) for each in classes))
        yield from to_uint8(images).cpu().chunk(len(steps))


def there_and_back(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """The frames, then the same backwards without the two ends, so that a player that repeats them shows no jump.

    They are kept in memory for the way back.
    """
    kept = []
    for frame in frames:
        kept.append(frame)
        yield frame
    yield from kept[-2:0:-1]


def _mix_pair(a: Tensor, b: Tensor, fraction: float, mode: Mode) -> Tensor:
    weights = _lerp_weights(a, fraction) if mode == "lerp" else _slerp_weights(a, b, fraction)
    weight_a, weight_b = (weight.to(a.dtype).reshape(-1, *[1] * (a.dim() - 1)) for weight in weights)
    return weight_a * a + weight_b * b


def _lerp_weights(a: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    ones = torch.ones(len(a), device=a.device, dtype=torch.float64)
    return (1 - fraction) * ones, fraction * ones


def _slerp_weights(a: Tensor, b: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    unit_a, unit_b = (nn.functional.normalize(x.flatten(1).double(), dim=1) for x in (a, b))
    angle = (unit_a * unit_b).sum(dim=1).clamp(-1, 1).acos()
    sine = angle.sin()
    return tuple(torch.where(sine > _SMALLEST_SINE, (share * angle).sin() / sine, straight)
                 for share, straight in zip((1 - fraction, fraction), _lerp_weights(a, fraction)))
