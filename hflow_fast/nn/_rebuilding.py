"""Segments of a chain of flow layers that keep no activations: the backward pass rebuilds them by inversion.

Each segment is a node of autograd's graph, and only the last one keeps its output, the chain's. In the backward pass a
segment is inverted, evaluated again with gradients, and differentiated; the input that it rebuilt goes to the segment
before, whose output that is. A coupling's network runs only once for all this: it sees passive elements, and these are
the same on both sides of the coupling.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import coupling
from ._folding import ChannelMap, invert_all
from ._fusion import Coupling, Opaque, apply_map, coupling_then_map, evaluate
from ._random_state import RandomState

__all__ = ["RebuiltSegment", "Segment", "Tape"]

_SAMPLES = 4  # of each dimension, about
_SMALLEST_NORM = 1e-6
_X, _WEIGHT, _BIAS, _CONTEXT, _PARAMETERS = 2, 3, 4, 5, 6  # arguments of RebuiltSegment.apply


class Segment:
    """A step of the chain, in one evaluation of it.

    Args:
        index: its place in the order of evaluation.
        label: what messages call it.
        first: its coupling or opaque piece.
        keeps_input: keep the input instead of rebuilding it.
        keeps_output: keep the output, where no segment behind rebuilds it.
    """

    def __init__(self, index: int, label: str, first: Coupling | Opaque | None, keeps_input: bool,
                 keeps_output: bool) -> None:
        self.index, self.label, self.first = index, label, first
        self.keeps_input, self.keeps_output = keeps_input, keeps_output
        self.random_state: RandomState | None = None
        self._parameters = self._now()

    @property
    def learned(self) -> list[nn.Parameter]:
        """The parameters that get gradients."""
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    def remember(self, x: Tensor) -> None:
        """What the backward pass has to find as it was, after the evaluation on ``x``."""
        self.shape, self.dtype = x.shape, x.dtype
        self._versions = [parameter._version for parameter in self._parameters]

    def check(self) -> None:
        """That a second evaluation is the first one again.

        Raises:
            RuntimeError: parameters changed, as by an optimizer's step.
        """
        now = self._now()
        if (len(now) != len(self._parameters) or any(one is not other for one, other in zip(now, self._parameters))
                or [parameter._version for parameter in now] != self._versions):
            raise RuntimeError(f"Reversible: parameters of {self.label} changed between the forward pass and its "
                               "backward pass, which evaluates the layers again; take the optimizer's step after the "
                               "backward pass.")

    def _now(self) -> list[nn.Parameter]:
        return [] if self.first is None or self.first.layer is None else list(self.first.layer.parameters())


class Tape:
    """What the segments of one evaluation of a chain share.

    Args:
        x: the chain's input.
        context: what its layers see, without a graph; gradients come in through the segments.
        maps: the folded map of each segment.
        report: gets labels of segments, and how far off their rebuilt inputs are.
    """

    def __init__(self, x: Tensor, context: Tensor | None, maps: Sequence[ChannelMap | None],
                 preserve_rng_state: bool, report: Callable[[list[str], Tensor], None]) -> None:
        device = x.device.type
        self._autocast = {"device_type": device, "enabled": torch.is_autocast_enabled(device),
                          "dtype": torch.get_autocast_dtype(device)}
        self.context, self._context_version = context, None if context is None else context._version
        self._maps = [folded and ChannelMap(*(field if field is None else field.detach() for field in folded[:3]))
                      for folded in maps]
        self._inverses: dict[int, ChannelMap] | None = None
        self.preserve_rng_state = preserve_rng_state
        self.rebuilt: Tensor | None = None
        """In the backward pass, the output of the segment to come."""
        self.lowest: int | None = None
        """The index of the segment where the backward pass ends."""
        self._samples: dict[int, Tensor] = {}
        self._found: list[tuple[str, Tensor, Tensor]] = []
        self._report = report

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast as it was when the chain was evaluated.

        Without its cache: weights cast with gradients off must not be found there when they are on.
        """
        if self._autocast["enabled"] or torch.is_autocast_enabled(self._autocast["device_type"]):
            return torch.autocast(**self._autocast, cache_enabled=False)
        return nullcontext()

    def before(self, segment: Segment, x: Tensor) -> None:
        """Notes what tells whether the input ``x`` is rebuilt well."""
        if not segment.keeps_input and x.numel():
            self._samples[segment.index] = _sample(x)

    def check(self) -> None:
        """That the context is what it was.

        Raises:
            RuntimeError: it was changed in place.
        """
        if self.context is not None and self.context._version != self._context_version:
            raise RuntimeError("Reversible: the context was changed in place between the forward pass and its backward "
                               "pass, which evaluates the layers again.")

    def output_of(self, segment: Segment) -> Tensor:
        """The segment's output, as the segment behind it rebuilt it, which is forgotten."""
        if self.rebuilt is None:
            raise RuntimeError(f"Reversible: the backward pass reached {segment.label} without the layers behind it.")
        rebuilt, self.rebuilt = self.rebuilt, None
        return rebuilt

    def undo_map(self, segment: Segment, y: Tensor) -> Tensor:
        """Undoes the segment's map. The matrices of all segments are inverted together, the first time."""
        if self._inverses is None:
            indices = [index for index, folded in enumerate(self._maps) if folded is not None]
            self._inverses = dict(zip(indices, invert_all([self._maps[index] for index in indices])))
        inverse = self._inverses.get(segment.index)
        return y if inverse is None else apply_map(y, inverse.weight, inverse.bias)

    def hand_over(self, segment: Segment, x: Tensor) -> None:
        """Gives the segment's input ``x``, rebuilt or kept, to the segment before it, and reports at the last one."""
        original = self._samples.get(segment.index)
        if original is not None:
            self._found.append((segment.label, original, _sample(x)))
        if segment.index > self.lowest:
            self.rebuilt = x
        elif self._found:
            found, self._found = self._found, []
            self._report([label for label, _, _ in found], _errors([pair[1:] for pair in found]))


class RebuiltSegment(torch.autograd.Function):
    """A segment: (segment, tape, x, weight, bias, context, *parameters that learn) → y, log|det| (B,) or None.

    ``weight`` and ``bias`` are those of the map behind the segment's coupling, or None; its log-det is not in there.
    """

    @staticmethod
    def forward(ctx: Any, segment: Segment, tape: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None,
                context: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        tape.before(segment, x)
        before = RandomState(x.device) if tape.preserve_rng_state else None
        with tape.autocast():
            y, term = evaluate(segment.first, weight, bias, x)
        segment.random_state = before if before is not None and before.has_changed() else None
        segment.remember(x)
        ctx.segment, ctx.tape = segment, tape
        ctx.save_for_backward(x if segment.keeps_input else None, y if segment.keeps_output else None, weight, bias)
        ctx.set_materialize_grads(False)
        return y, term

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_term: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("Reversible has no second derivatives (create_graph=True), since it keeps no activations "
                               "for them; differentiate its chain instead: reversible.chain(x).")
        segment, tape, needed = ctx.segment, ctx.tape, ctx.needs_input_grad
        segment.check()
        tape.check()
        x, y, weight, bias = ctx.saved_tensors
        weight = weight if weight is None else weight.detach().requires_grad_(needed[_WEIGHT])
        bias = bias if bias is None else bias.detach().requires_grad_(needed[_BIAS])
        with tape.autocast():
            if x is None:
                y = tape.output_of(segment) if y is None else y.detach()
                inputs, y, term = _rebuild(segment, tape, y, weight, bias, needed[_X])
            else:
                inputs = [x.detach().requires_grad_(needed[_X])]
                with torch.enable_grad(), _random_state_of(segment):
                    y, term = evaluate(segment.first, weight, bias, inputs[0])
        tape.hand_over(segment, inputs[0].detach())
        sources = {_X: inputs, _WEIGHT: [weight], _BIAS: [bias], _CONTEXT: [tape.context],
                   **{_PARAMETERS + i: [parameter] for i, parameter in enumerate(segment.learned)}}
        outputs = [(output, gradient) for output, gradient in ((y, grad_y), (term, grad_term))
                   if gradient is not None and output.requires_grad]
        return _gradients(outputs, {i: sources[i] for i in sources if needed[i]}, len(needed))


def _rebuild(segment: Segment, tape: Tape, y: Tensor, weight: Tensor | None, bias: Tensor | None,
             needed: bool) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The segment evaluated again, with gradients, given its output: [input, …], output, log-det.

    The gradients of all that is listed as input add up to that of the input.
    """
    first = segment.first
    u = tape.undo_map(segment, y)
    if isinstance(first, Coupling):
        # What the network sees of u is what it sees of x.
        passive = u.detach().requires_grad_(needed)
        with torch.enable_grad(), _random_state_of(segment):
            raw = first.raw(passive)
        x = coupling(u, raw.detach(), first.spec, inverse=not first.inverse)[0]
        inputs = [_leaf(segment, x, needed), passive]
        with torch.enable_grad():
            return inputs, *coupling_then_map(first, raw, weight, bias, inputs[0])
    if isinstance(first, Opaque):
        with _random_state_of(segment):
            u = first.undo(u)[0]
    inputs = [_leaf(segment, u, needed)]
    with torch.enable_grad(), _random_state_of(segment):
        return inputs, *evaluate(first, weight, bias, inputs[0])


def _leaf(segment: Segment, x: Tensor, needed: bool) -> Tensor:
    if x.shape != segment.shape:
        raise RuntimeError(f"Reversible: the inverse of {segment.label} gave the shape {tuple(x.shape)} where "
                           f"{tuple(segment.shape)} went in.")
    return x.detach().to(segment.dtype).requires_grad_(needed)


def _random_state_of(segment: Segment) -> AbstractContextManager[None]:
    return nullcontext() if segment.random_state is None else segment.random_state.restored()


def _gradients(outputs: list[tuple[Tensor, Tensor]], sources: dict[int, list[Tensor]],
               count: int) -> tuple[Tensor | None, ...]:
    """One for each argument; an argument's is the sum of those of its sources."""
    results: list[Tensor | None] = [None] * count
    if outputs and sources:
        flat = [(argument, tensor) for argument, tensors in sources.items() for tensor in tensors]
        gradients = torch.autograd.grad([output for output, _ in outputs], [tensor for _, tensor in flat],
                                        [gradient for _, gradient in outputs], allow_unused=True)
        for (argument, _), gradient in zip(flat, gradients):
            if gradient is not None:
                results[argument] = gradient if results[argument] is None else results[argument] + gradient
    return tuple(results)


def _sample(x: Tensor) -> Tensor:
    """Some elements of every sample of ``x`` (B, …): (B, n). Odd strides visit both halves of a checkerboard."""
    steps = (slice(None, None, size // _SAMPLES | 1) for size in x.shape[1:])
    return x.detach()[(slice(None), *steps)].flatten(1).clone()


def _errors(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How far off each rebuilt sample (B, n) is, relative to the original: (N,), the worst of every batch."""
    errors = [None] * len(pairs)
    for shape in {original.shape for original, _ in pairs}:
        indices = [index for index, (original, _) in enumerate(pairs) if original.shape == shape]
        originals, rebuilt = (torch.stack([pairs[index][side] for index in indices]).double() for side in (0, 1))
        norms = originals.norm(dim=-1).clamp_min(_SMALLEST_NORM)
        for index, error in zip(indices, ((rebuilt - originals).norm(dim=-1) / norms).amax(-1).unbind()):
            errors[index] = error
    return torch.stack(errors)
