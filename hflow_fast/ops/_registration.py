"""What every operation registers with torch beside its kernels: fake outputs, autograd, autocast.

Contract with the schemas in ``csrc/ops.cpp``: ``<op>_fwd(tensors…, options…)`` and
``<op>_bwd(tensors…, gradients of the outputs…, options…)``, which returns one gradient per tensor. The first tensor
is the flow variable; it decides the memory format of everything with four dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hflow_fast import _extension

__all__ = ["empty_like_in", "format_of", "register", "register_autocast", "register_autograd"]

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


def register(op: str, tensors: int, fake: Callable[..., Any]) -> Callable[..., Any] | None:
    """Register the fake, autograd and autocast implementations of ``op``; its first ``tensors`` arguments are tensors.

    ``fake`` takes the arguments of ``<op>_fwd``, checks them and returns empty outputs. Under autocast a half-precision
    flow variable becomes float32, so that flow variables and log-dets keep their precision; the other tensors are read
    as they are, which saves a cast pass over a network's output.

    Returns ``<op>_fwd`` as a function that costs less to call; ``None`` without the extension.
    """
    if _extension.missing_reason() is not None:
        return None
    forward_op = getattr(torch.ops.hflow_fast, f"{op}_fwd").default
    backward_op = getattr(torch.ops.hflow_fast, f"{op}_bwd").default

    def fake_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        memory_format = format_of(arguments[0])
        return tuple(empty_like_in(tensor, memory_format) for tensor in arguments[:tensors])

    torch.library.register_fake(f"hflow_fast::{op}_fwd", fake)
    torch.library.register_fake(f"hflow_fast::{op}_bwd", fake_backward)
    for key in ("AutocastCPU", "AutocastCUDA"):
        register_autocast(forward_op, key)
    return _differentiate(forward_op, backward_op, tensors)


def _differentiate(
    forward_op: torch._ops.OpOverload, backward_op: torch._ops.OpOverload, tensors: int
) -> Callable[..., Any]:
    """Autograd by ``backward_op``, which has no derivative itself."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, kernel: Callable[..., Any], options: tuple[Any, ...], *inputs: torch.Tensor) -> Any:
            ctx.save_for_backward(*inputs)
            ctx.options = options
            return kernel(*inputs, *options)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            arguments = *ctx.saved_tensors, *gradients, *ctx.options
            # Gradients are enabled for create_graph=True only.
            computed = Gradient.apply(*arguments) if torch.is_grad_enabled() else backward_op(*arguments)
            return None, None, *computed

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

    return register_autograd(forward_op, Function, tensors)


def register_autograd(
    forward_op: torch._ops.OpOverload, function: type[torch.autograd.Function], tensors: int
) -> Callable[..., Any]:
    """Differentiate ``forward_op`` by ``function``, and return what calls ``forward_op`` at the least cost.

    ``function.forward(ctx, kernel, options, *inputs)`` has to return ``kernel(*inputs, *options)``; its backward pass
    returns ``None`` for the first two. Unlike torch.library.register_autograd this treats no default arguments, which
    costs time quadratic in the number of a schema's arguments.

    A call through the dispatcher enters Python once more, in the kernel registered here, which takes twice as long as
    a small kernel. What is returned goes straight to ``function`` and to the kernel below autograd where nothing else
    listens: no tracing, no function transform, no autocast, no subclass of tensors. Dispatch modes still see the call.
    """
    # Without torch.autograd.Function.apply's search for what function transforms left behind, done here for tensors.
    apply = super(torch.autograd.Function, function).apply

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*arguments)

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        def redispatch(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

        if _needs_gradient(arguments[:tensors]):
            return function.apply(redispatch, arguments[tensors:], *arguments[:tensors])
        return redispatch(*arguments)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward_op(*arguments)
        inputs = arguments[:tensors]
        if not _only_autograd_listens(inputs):
            return forward_op(*arguments)
        if _needs_gradient(inputs):
            return apply(below_autograd, arguments[tensors:], *inputs)
        return below_autograd(*arguments)

    _library.impl(forward_op.name().removeprefix("hflow_fast::"), kernel, "Autograd", with_keyset=True)
    return call


def _only_autograd_listens(inputs: tuple[torch.Tensor, ...]) -> bool:
    for tensor in inputs:
        plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
        if not plain or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.is_autocast_enabled(inputs[0].device.type)
    )


def _needs_gradient(inputs: tuple[torch.Tensor, ...]) -> bool:
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor.requires_grad:
                return True
    return False


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
