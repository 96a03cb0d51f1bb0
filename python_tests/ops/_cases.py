"""What the tests of every operation share: tensors, gradients, and the measure of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st

from hflow_fast.ops import CouplingSpec

MEMORY = ("contiguous", "channels_last", "permuted")
LAYOUTS = (*MEMORY, "sliced", "expanded")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Function = Callable[..., tuple[torch.Tensor, ...]]


def tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    memory: str,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Standard normal values, rounded to ``dtype`` and laid out as ``memory`` says; four dimensions or any for some."""
    values = torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)
    return laid_out(values, memory)


def laid_out(values: torch.Tensor, memory: str) -> torch.Tensor:
    """The values in one of LAYOUTS. Sliced: a part of a larger tensor. Expanded: the first entry in place of each, but
    for matrices, which would become singular."""
    if values.dim() == 4 and memory == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if values.dim() == 4 and memory == "permuted":
        return values.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    if memory == "sliced" and values.dim():
        larger = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), torch.nan)
        larger[..., 1::2] = values
        return larger[..., 1::2]
    if memory == "expanded" and values.dim() not in (0, 2) and values.shape[0]:
        return values[:1].expand(values.shape)
    return values


def run(function: Function, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of ``function(*tensors)``, and the gradients of a fixed random projection of them."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (o.double() * torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.device)).sum()
        for o in outputs
    )
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [t.detach() for t in (*outputs, *gradients)]


def assert_accurate(ours: Function, reference: Function, tensors: Sequence[torch.Tensor], atol: float) -> None:
    """Outputs and gradients: the error against float64 is at most twice the reference's in the same dtypes, plus atol.

    ``atol`` is for entries of magnitude one; sums of n elements of x may be √n times as far off, as their rounding
    errors walk randomly. Dtypes and shapes must be the reference's.
    """
    exact = run(reference, [t.cpu().double() for t in tensors])
    for number, (a, b, e) in enumerate(zip(run(ours, tensors), run(reference, tensors), exact, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"result {number}"
        if a.numel() == 0:
            continue
        error, allowed = (a.cpu().double() - e).abs().max(), (b.cpu().double() - e).abs().max()
        terms = max(1.0, tensors[0].numel() / e.numel())
        limit = 2 * allowed + atol * terms**0.5 * e.abs().max().clamp(min=1)
        assert error <= limit, f"result {number}: error {error:.3g}, the reference's {allowed:.3g}, limit {limit:.3g}"


def atol_of(*tensors: torch.Tensor) -> float:
    """Some units in the last place of the coarsest dtype: 4, or 64 in float64, where the reference counts as exact."""
    eps = max(torch.finfo(t.dtype).eps for t in tensors)
    return 64 * eps if eps == torch.finfo(torch.float64).eps else 4 * eps


def log_det_of_jacobian(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """log|det| of autograd's Jacobian of ``function`` for every sample of x, (B,)."""
    jacobians = []
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda s: function(s[None])[0], sample)
        jacobians.append(torch.linalg.slogdet(jacobian.reshape(sample.numel(), -1)).logabsdet)
    return torch.stack(jacobians)


def same_bits_for_any_thread_count(function: Function, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether outputs and gradients are bit-equal with 1, 2 and 3 threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(function, tensors))
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


SCALE_MAPS = ("none", "exp", "exp_clip", "exp_tanh", "sigmoid", "sigmoid_inverse", "sigmoid_floor", "atan", "tanh")
SPECS = st.builds(
    CouplingSpec,
    scale_map=st.sampled_from(SCALE_MAPS),
    clamp=st.sampled_from([0.7, 3.0]),
    shift_clamp=st.sampled_from([None, 0.8]),
    layout=st.sampled_from(["halves", "interleaved"]),
    shift_first=st.booleans(),
    form=st.sampled_from(["scale_shift", "add_scale", "subtract_scale"]),
    active=st.sampled_from(["all", "channels", "channels_ceil", "checkerboard", "columns", "rows"]),
    block=st.sampled_from([1, 2, 4, 8]),
    parity=st.sampled_from([0, 1]),
)


@st.composite
def coupling_cases(
    draw: st.DrawFn, channels: st.SearchStrategy[int] = st.integers(1, 9)
) -> tuple[CouplingSpec, tuple[int, ...], int]:
    """A spec, the shape of an x that it fits, and the number of raw's channels."""
    spec = draw(SPECS)
    batch, channels = draw(st.integers(1, 3)), draw(channels)
    rank = draw(st.integers(3, 4) if spec.spatial else st.integers(2, 4))
    size = st.one_of(st.integers(1, 12), st.integers(20, 40))
    shape = (batch, channels, *(draw(size) for _ in range(rank - 2)))
    whole = draw(st.booleans())
    return spec, shape, spec.raw_channels(channels if whole else spec.active_channels(channels))
