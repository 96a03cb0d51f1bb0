"""Elementwise affine transform by a network's raw output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hflow_fast import reference
from hflow_fast._checks import check_coupling, compute_dtype
from hflow_fast._extension import has_kernel
from hflow_fast.ops._registration import empty_like_in, format_of, register

__all__ = ["CouplingSpec", "active_mask", "coupling"]

# Numbers of the enumerations in csrc/formulas.h and csrc/common/coupling_geometry.h: the position in the tuple.
_SCALE_MAPS = (
    "none", "exp", "exp_clip", "exp_tanh", "sigmoid", "sigmoid_inverse", "sigmoid_floor", "atan", "tanh",
)  # fmt: skip
_LAYOUTS = (("halves", False), ("halves", True), ("interleaved", False), ("interleaved", True))
_FORMS = ("scale_shift", "add_scale", "subtract_scale")
_ACTIVE = ("all", "channels", "channels_ceil", "checkerboard", "columns", "rows")


@dataclass(frozen=True)
class CouplingSpec:
    r"""How a coupling reads a network's raw output. Immutable; make it once and use it for every call.

    Args:
        scale_map: The scale a(s) from the raw scale s:
            ``"none"`` a = 1 (additive), ``"exp"`` :math:`e^s`,
            ``"exp_clip"`` :math:`e^{\mathrm{clip}(s, \pm c)}` (HFlow), ``"exp_tanh"`` :math:`e^{\tanh s}` (Wavelet Flow),
            ``"sigmoid"`` :math:`\sigma(s + 2)` (Glow), ``"sigmoid_inverse"`` :math:`1 / \sigma(s + 2)` (normflows),
            ``"sigmoid_floor"`` :math:`\sigma(s + 2) + 10^{-3}` (nflows),
            ``"atan"`` :math:`e^{0.636\, c \arctan s}` and ``"tanh"`` :math:`e^{c \tanh(s / c)}` (FrEIA).
        clamp: c of the maps that use one; positive.
        shift_clamp: Hard clip of the shift to ±shift_clamp (HFlow: 5), or ``None``.
        layout: ``"halves"``, scales before shifts, or ``"interleaved"``, alternating channels.
        shift_first: raw holds the shift before the scale.
        form: Forward transform: ``"scale_shift"`` a·x + t, ``"add_scale"`` (x + t)·a or ``"subtract_scale"`` (x − t)·a.
        active: What is transformed: ``"all"``; ``"channels"``, those from ⌊C/2⌋ on; ``"channels_ceil"``, those from
            ⌈C/2⌉ on; ``"checkerboard"`` of squares of ``block`` pixels; ``"columns"`` or ``"rows"``, one half of the
            image.
        block: Side of a checkerboard's squares, 1, 2, 4 or 8: pixel (i, j) is active where
            (i // block + j // block) % 2 == parity.
        parity: 0 or 1; the half that is active: of a checkerboard, or 0 left or top, 1 right or bottom.

    Raises:
        ValueError: A value is not one of these.
    """

    scale_map: str = "exp"
    clamp: float = 3.0
    shift_clamp: float | None = None
    layout: str = "halves"
    shift_first: bool = False
    form: str = "scale_shift"
    active: str = "all"
    block: int = 1
    parity: int = 0
    arguments: tuple[int | float, ...] = field(init=False, repr=False, compare=False)
    """The options in the order of the kernels' schemas, encoded once."""

    def __post_init__(self) -> None:
        _check_choice("scale_map", self.scale_map, _SCALE_MAPS)
        _check_choice("layout", self.layout, ("halves", "interleaved"))
        _check_choice("form", self.form, _FORMS)
        _check_choice("active", self.active, _ACTIVE)
        _check_choice("block", self.block, (1, 2, 4, 8))
        _check_choice("parity", self.parity, (0, 1))
        if not isinstance(self.clamp, (int, float)) or not self.clamp > 0:
            raise ValueError(f"CouplingSpec: clamp must be positive, got {self.clamp!r}")
        if self.shift_clamp is not None and not self.shift_clamp > 0:
            raise ValueError(f"CouplingSpec: shift_clamp must be positive or None, got {self.shift_clamp!r}")
        arguments = (
            _SCALE_MAPS.index(self.scale_map),
            float(self.clamp),
            math.inf if self.shift_clamp is None else float(self.shift_clamp),
            _LAYOUTS.index((self.layout, bool(self.shift_first))),
            _FORMS.index(self.form),
            _ACTIVE.index(self.active),
            self.block,
            self.parity,
        )
        object.__setattr__(self, "arguments", arguments)

    @property
    def spatial(self) -> bool:
        """Whether the active set depends on the pixel."""
        return self.active in ("checkerboard", "columns", "rows")

    def active_channels(self, channels: int) -> int:
        """How many of x's channels are transformed (all for spatial sets); they are the last ones."""
        if self.active == "channels":
            return channels - channels // 2
        return channels // 2 if self.active == "channels_ceil" else channels

    def raw_channels(self, channels: int) -> int:
        """How many channels raw needs to transform ``channels`` channels."""
        return channels if self.scale_map == "none" else 2 * channels


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"CouplingSpec: {name} must be one of {expected}, got {value!r}")


def active_mask(spec: CouplingSpec, shape: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """Which elements of a flow variable ``spec`` transforms.

    Kernels compute this from the index; it is for code that prepares a network's input.

    Args:
        spec: The coupling.
        shape: (B, C, ...) of the flow variable.
        device: Where the mask is made.

    Returns:
        Boolean, true where active, broadcastable to ``shape``: (C, 1, ...) or, for spatial sets, (H, W) or (L,).
    """
    return reference.active_mask(spec, shape, device)


def coupling(
    x: torch.Tensor, raw: torch.Tensor, spec: CouplingSpec = CouplingSpec(), *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Transform x elementwise by scales and shifts that a network computed, with the log-determinant in the same pass.

    .. math:: y = a(s)\, x + t, \qquad \log|\det| = \sum_{\text{active}} \log a(s)

    or another of :class:`CouplingSpec`'s forms; with ``inverse``, the exact inverse. Affine coupling: Dinh et al.,
    "Density estimation using Real NVP", 2017, equations 7 and 8. That raw does not depend on active elements of x is
    the caller's business; passive elements pass through.

    Args:
        x: (B, C), (B, C, L) or (B, C, H, W); contiguous and channels_last are read as they are, other strides are made
            contiguous. float32, float64, bfloat16 or float16.
        raw: The network's output, of x's shape but with 2C channels (C for ``scale_map="none"``); for the channel sets
            also 2 × (number of active channels). Values outside the active set are ignored. Any of these dtypes: a
            bfloat16 network output beside a float32 x needs no cast.
        spec: How raw is read.
        inverse: Apply the inverse.

    Returns:
        ``(y, log_det)``: y like x, in its memory format; log_det (B,), in nats, of the evaluated direction, float32, or
        float64 for float64 x. log_det has the same bits for any number of threads.

    Raises:
        ValueError: A shape, dtype or device does not fit; the text names the argument and what it got.

    Example:
        >>> x = torch.randn(2, 4, 8, 8)
        >>> raw = torch.randn(2, 4, 8, 8)  # 2 · 2 active channels
        >>> spec = CouplingSpec(scale_map="sigmoid", active="channels")
        >>> y, log_det = coupling(x, raw, spec)
        >>> x_again, log_det_inverse = coupling(y, raw, spec, inverse=True)
        >>> torch.allclose(x_again, x, atol=1e-5), torch.allclose(log_det_inverse, -log_det)
        (True, True)
    """
    if not has_kernel("coupling", x.device):
        return reference.coupling(x, raw, spec, inverse=inverse)
    return torch.ops.hflow_fast.coupling_fwd.default(x, raw, *spec.arguments, inverse)


def spec_of(
    scale_map: int, clamp: float, shift_clamp: float, layout: int, form: int, active: int, block: int, parity: int
) -> CouplingSpec:
    """The spec whose ``arguments`` these are."""
    name, shift_first = _LAYOUTS[layout]
    return CouplingSpec(
        scale_map=_SCALE_MAPS[scale_map],
        clamp=clamp,
        shift_clamp=None if math.isinf(shift_clamp) else shift_clamp,
        layout=name,
        shift_first=shift_first,
        form=_FORMS[form],
        active=_ACTIVE[active],
        block=block,
        parity=parity,
    )


def _fake(x: torch.Tensor, raw: torch.Tensor, *options: int | float) -> tuple[torch.Tensor, torch.Tensor]:
    check_coupling("coupling", x, raw, spec_of(*options[:-1]))
    return empty_like_in(x, format_of(x)), x.new_empty(x.shape[0], dtype=compute_dtype(x))


register("coupling", 2, _fake)
