"""What every operation registers with torch beside its kernels: fake outputs, autograd, autocast.

Contract with the schemas in ``csrc/ops.cpp``: ``<op>_fwd(tensors…, options…)`` and
``<op>_bwd(tensors…, gradients of the outputs…, options…)``, which returns one gradient per tensor. The first tensor
is the flow variable, or what a network's op works on; it decides the memory format of everything with four dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hflow_fast import _extension

__all__ = ["empty_like_in", "format_of", "register"]

_library = torch.library.Library("hflow_fast", "FRAGMENT")


def format_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format a kernel works in, chosen as ``format_of`` in ``csrc/common/tensor.h`` does."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_like_in(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Uninitialised, like ``tensor``, dense in ``memory_format`` where it has four dimensions."""
    chosen = memory_format if tensor.dim() == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=chosen)


def register(op: str, tensors: int, fake: Callable[..., Any], autocast: bool = True) -> None:
    """Register the fake, autograd and autocast implementations of ``op``; its first ``tensors`` arguments are tensors.

    ``fake`` takes the arguments of ``<op>_fwd``, checks them and returns empty outputs. Under autocast a half-precision
    flow variable becomes float32, so that flow variables and log-dets keep their precision; the other tensors are read
    as they are, which saves a cast pass over a network's output. The ops inside networks say ``autocast=False``: they
    follow the precision of the network, whatever it is.
    """
    if _extension.missing_reason() is not None:
        return
    forward_op = getattr(torch.ops.hflow_fast, f"{op}_fwd").default
    backward_op = getattr(torch.ops.hflow_fast, f"{op}_bwd").default

    def fake_backward(*arguments: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        memory_format = format_of(arguments[0])
        gradients = tuple(empty_like_in(tensor, memory_format) for tensor in arguments[:tensors])
        return gradients if tensors > 1 else gradients[0]

    torch.library.register_fake(f"hflow_fast::{op}_fwd", fake)
    torch.library.register_fake(f"hflow_fast::{op}_bwd", fake_backward)
    _register_autograd(forward_op, backward_op, tensors)
    for key in ("AutocastCPU", "AutocastCUDA") if autocast else ():
        register_autocast(forward_op, key)


def _register_autograd(forward_op: torch._ops.OpOverload, backward_op: torch._ops.OpOverload, tensors: int) -> None:
    """What torch.library.register_autograd does, without its treatment of default arguments.

    That costs time quadratic in the number of a schema's arguments: 40 of 125 µs for a small coupling's forward and
    backward, and our schemas have no defaults.
    """

    def below_autograd(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
            ctx.save_for_backward(*arguments[:tensors])
            ctx.options = arguments[tensors:]
            return below_autograd(keyset, *arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            arguments = *ctx.saved_tensors, *gradients, *ctx.options
            # Gradients are enabled for create_graph=True only.
            computed = Gradient.apply(*arguments) if torch.is_grad_enabled() else backward_op(*arguments)
            return None, *_as_tuple(computed), *(None for _ in ctx.options)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
            return backward_op(*arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> None:
            name = forward_op.name().removeprefix("hflow_fast::").removesuffix("_fwd")
            raise RuntimeError(
                f"hflow_fast.ops.{name} has no second derivative; differentiate hflow_fast.reference.{name} instead"
            )

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments[:tensors]):
            return Function.apply(keyset, *arguments)
        return below_autograd(keyset, *arguments)

    _library.impl(forward_op.name().removeprefix("hflow_fast::"), kernel, "Autograd", with_keyset=True)


def _as_tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What an op returned, which is a bare tensor where it is one."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def register_autocast(op: torch._ops.OpOverload, key: str) -> None:
    """Under autocast, call ``op`` with its first tensor, the flow variable, in float32 where it was of a half type."""
    dispatch_key = getattr(torch._C.DispatchKey, key)

    @op.py_impl(dispatch_key)
    def kernel(x: torch.Tensor, *rest: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(dispatch_key)):
            return op(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, *rest)

    _library.impl(
        op.name().removeprefix("hflow_fast::"), lambda _, *arguments: kernel(*arguments), key, with_keyset=True
    )
