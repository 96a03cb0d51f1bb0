"""Training of deep flows in memory that does not grow with their depth."""

from __future__ import annotations

import warnings
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._folding import ChannelMap
from ._fusion import Coupling, LogDet, Opaque, Piece, Step, evaluate, fold_maps, is_altered, pieces_of, steps_of
from ._rebuilding import RebuiltSegment, Segment, Tape
from .container import Sequential

__all__ = ["Reversible"]


class Reversible(nn.Module):
    r"""A chain of flow layers that keeps no activations for the backward pass: it rebuilds them by inversion.

    Gomez et al., "The Reversible Residual Network", NeurIPS 2017, for flows with log-dets. Between the forward pass and
    its backward pass only the chain's input and output are there, however deep it is. The backward pass walks from the
    latent to the data: it inverts a coupling with the channel map behind it, evaluates both again, and takes their
    gradients. A coupling's network runs once more, as in :mod:`torch.utils.checkpoint`; other layers run once in either
    direction. Fused layers stay fused. Outputs are those of the chain, and so are gradients, but for the rounding of
    the inversion, and so is the first pass, in which actnorms initialise themselves.

    What the rounding amounts to is measured in every backward pass, on some elements of each activation, and read by
    :meth:`inversion_error`. On a CPU, where reading is free, a :class:`RuntimeWarning` names the layer where it exceeds
    ``limit``. ``keep_every`` bounds it: the inversion starts afresh from every activation kept.

    Networks have to be functions of their inputs, the context and their own parameters. They may draw random numbers
    (dropout): the second run draws the same. Batch norm counts both runs. There are no second derivatives. In autocast
    the second run is like the first; under ``torch.compile``, which cannot follow an inversion, the inputs of the
    couplings are kept and just what is inside of them is computed again.

    Args:
        chain: a :class:`Sequential`, or layers ``z, log_det = layer(x, context)`` with ``layer.inverse``.
        keep_every: keep the input of every so many steps (a step is a coupling, or another layer, with the maps fused
            to it). None keeps the chain's only.
        preserve_rng_state: draw the same random numbers in the second run. False saves looking at the generators where
            no network draws any, and is required in a CUDA graph.
        limit: the relative error of a rebuilt activation above which gradients should not be trusted.

    Raises:
        ValueError: a layer has no inverse, or an argument is out of range.

    Example:
        >>> from hflow_fast.nn import ActNorm, AffineCoupling, InvConv1x1
        >>> def step() -> list[nn.Module]:
        ...     return [ActNorm(4), InvConv1x1(4), AffineCoupling(nn.Conv2d(2, 4, 3, padding=1))]
        >>> flow = Reversible([layer for _ in range(8) for layer in step()])
        >>> z, log_det = flow(torch.randn(2, 4, 8, 8))
        >>> (z.square().sum() / 2 - log_det.sum()).backward()
        >>> flow.inversion_error() < 1e-3
        True
    """

    def __init__(self, chain: Sequential | Iterable[nn.Module], keep_every: int | None = None,
                 preserve_rng_state: bool = True, limit: float = 1e-2) -> None:
        super().__init__()
        if keep_every is not None and (not isinstance(keep_every, int) or keep_every < 1):
            raise ValueError(f"Reversible: keep_every must be a positive number of steps or None, got {keep_every!r}.")
        if not limit > 0:
            raise ValueError(f"Reversible: limit must be positive, got {limit!r}.")
        self.chain = chain if isinstance(chain, Sequential) else Sequential(*chain)
        if any(getattr(type(self.chain), name) is not getattr(Sequential, name)
               for name in ("forward", "inverse", "pieces")):
            raise ValueError(f"Reversible: chain is a {type(self.chain).__name__}, which does more than run its layers "
                             "one after another; give the layers.")
        for name, layer in self.chain.named_children():
            if not callable(getattr(layer, "inverse", None)):
                raise ValueError(f"Reversible: layer {name}, {type(layer).__name__}, has no method inverse to rebuild "
                                 "its input with.")
        self.keep_every, self.preserve_rng_state, self.limit = keep_every, preserve_rng_state, limit
        self._errors: dict[tuple[str, ...], Tensor] = {}
        self._has_warned = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → latent and log|det| (B,)."""
        return self._evaluate(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent → data and log|det| (B,)."""
        return self._evaluate(z, context, inverse=True)

    def inversion_error(self) -> float:
        """The largest error of a rebuilt activation since the last :meth:`reset_inversion_error`, relative to its size.

        NaN where an inverse gave NaN, 0 where nothing was rebuilt yet. Waits for the device.
        """
        errors = [error.max() for error in self._errors.values()]
        return float(torch.stack([error.to(errors[0].device) for error in errors]).max()) if errors else 0.0

    def inversion_errors(self) -> dict[str, float]:
        """The largest error at the input of each step that is rebuilt, from the latent on; as :meth:`inversion_error`.

        An error grows on its way to the data; the step where it jumps is behind it.
        """
        found: dict[str, float] = {}
        for labels, errors in self._errors.items():
            for label, error in zip(labels, errors.tolist()):
                if not error <= found.get(label, 0.0):  # NaN is the largest
                    found[label] = error
        return found

    def reset_inversion_error(self) -> None:
        """Forgets the errors so far, and that there was a warning."""
        self._errors.clear()
        self._has_warned = False

    def extra_repr(self) -> str:
        return f"keep_every={self.keep_every}"

    def _evaluate(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if is_altered(self.chain):
            raise ValueError("Reversible: hooks on the chain itself would not run; register them on the Reversible, or "
                             "on the layers of the chain.")
        if not torch.is_grad_enabled():
            return self.chain.inverse(x, context) if inverse else self.chain(x, context)
        if torch.compiler.is_compiling():
            return self._checkpointed(x, context, inverse)
        return self._rebuilt(x, context, inverse)

    def _rebuilt(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        seen = None if context is None else context.detach().requires_grad_(context.requires_grad)
        named = list(_named_pieces(self.chain, inverse, seen))
        steps = steps_of(piece for _, piece in named)
        maps = fold_maps(steps, x, name="Reversible")
        tape = Tape(x, seen, maps, self._preserves_rng_state(x), self._report)
        log_det = LogDet()
        for index, (label, step, folded) in enumerate(zip(_labels(named, steps), steps, maps)):
            keeps = index % (self.keep_every or len(steps)) == 0
            segment = Segment(index, label, step.first, keeps, not keeps and index == len(steps) - 1)
            weight, bias = (None, None) if folded is None else folded[:2]
            x, term = RebuiltSegment.apply(segment, tape, x, weight, bias, context, *segment.learned)
            if tape.lowest is None and x.requires_grad:
                tape.lowest = index
            if term is not None:
                log_det.add(term)
            if folded is not None:
                log_det.add_map(folded.log_det, x)
        return x, log_det.total(x)

    def _checkpointed(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        steps = steps_of(piece for _, piece in _named_pieces(self.chain, inverse, context))
        log_det = LogDet()
        for step, folded in zip(steps, fold_maps(steps, x, name="Reversible")):
            weight, bias = (None, None) if folded is None else folded[:2]
            if step.first is None:
                x, term = evaluate(None, weight, bias, x)
            else:
                x, term = checkpoint(evaluate, step.first, weight, bias, x, use_reentrant=False,
                                     preserve_rng_state=self.preserve_rng_state)
                log_det.add(term)
            if folded is not None:
                log_det.add_map(folded.log_det, x)
        return x, log_det.total(x)

    def _preserves_rng_state(self, x: Tensor) -> bool:
        if self.preserve_rng_state and x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("Reversible: in a CUDA graph random numbers cannot be drawn again; if no network draws "
                               "any, say so with preserve_rng_state=False.")
        return self.preserve_rng_state

    def _report(self, labels: list[str], errors: Tensor) -> None:
        known = self._errors.get(tuple(labels))
        if known is None or known.device != errors.device:
            self._errors[tuple(labels)] = errors.clone()
        else:
            torch.maximum(known, errors, out=known)
        if errors.is_cpu and not self._has_warned:
            self._warn(zip(labels, errors.tolist()))

    def _warn(self, found: Iterable[tuple[str, float]]) -> None:
        for label, error in found:
            if not error <= self.limit:
                self._has_warned = True
                warnings.warn(
                    f"Reversible: the input of {label}, rebuilt by inversion, is off by {error:.2g} of its size, above "
                    f"the limit of {self.limit:g}: gradients from there to the chain's input cannot be trusted. Layers "
                    "behind it amplify rounding. Keep activations on the way with keep_every, keep those layers away "
                    "from singular ones (parametrization='orthogonal', a scale map with bounds), or use float64.",
                    RuntimeWarning, stacklevel=2)
                return


def _named_pieces(layer: nn.Module, inverse: bool, context: Tensor | None,
                  name: str = "") -> Iterator[tuple[str, Piece]]:
    """Every piece of ``layer`` with what messages call the layer it comes from, containers taken apart."""
    if type(layer) is Sequential and not is_altered(layer):
        children = list(layer.named_children())
        for child, module in reversed(children) if inverse else children:
            yield from _named_pieces(module, inverse, context, f"{name}.{child}" if name else child)
        return
    label = f"layer {name} ({type(layer).__name__})"
    for piece in pieces_of(layer, inverse, context):
        if isinstance(piece, Opaque) and piece.undo is None:
            raise ValueError(f"Reversible: {label} does not say how to undo what it does.")
        if isinstance(piece, (Coupling, Opaque)) and piece.layer is None:
            piece = piece._replace(layer=layer)
        elif isinstance(piece, ChannelMap):
            piece = piece._replace(alone=None)  # it has no part that autograd would see through a segment
        yield label, piece


def _labels(named: list[tuple[str, Any]], steps: list[Step]) -> Iterator[str]:
    """What messages call each step: the layer that it begins with."""
    position = 0
    for step in steps:
        yield named[position][0]
        position += (step.first is not None) + len(step.maps)
