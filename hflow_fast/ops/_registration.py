"""What every operation registers with torch beside its kernels: fake outputs, autograd, autocast.

Contract with the schemas in ``csrc/ops.cpp``: ``<op>_fwd(tensors…, options…)`` and
``<op>_bwd(tensors…, gradients of the outputs…, options…)``, which returns one gradient per tensor. The first tensor
is the flow variable, or what a network's op works on; it decides the memory format of everything with four dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from hflow_fast import _extension
from hflow_fast._checks import check_floating

__all__ = [
    "empty_like_in",
    "format_of",
    "refuse_layouts",
    "refuse_transforms",
    "register",
    "register_autocast",
    "register_autograd",
]

_library = torch.library.Library("hflow_fast", "FRAGMENT")
_NOT_DENSE = (
    "SparseCPU", "SparseCUDA", "SparseMeta", "SparseCsrCPU", "SparseCsrCUDA", "SparseCsrMeta",
    "MkldnnCPU", "QuantizedCPU", "QuantizedCUDA",
)  # fmt: skip


def format_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format a kernel works in, chosen as ``format_of`` in ``csrc/common/tensor.h`` does."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_like_in(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Uninitialised, like ``tensor``, dense in ``memory_format`` where it has four dimensions."""
    chosen = memory_format if tensor.dim() == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=chosen)


def register(
    op: str, tensors: int, fake: Callable[..., Any], autocast: bool = True, second_derivative: str = ""
) -> Callable[..., Any] | None:
    """Register the fake, autograd and autocast implementations of ``op``; its first ``tensors`` arguments are tensors.

    ``fake`` takes the arguments of ``<op>_fwd``, checks them and returns empty outputs. Under autocast a half-precision
    flow variable becomes float32, so that flow variables and log-dets keep their precision; the other tensors are read
    as they are, which saves a cast pass over a network's output. The ops inside networks say ``autocast=False``: they
    follow the precision of the network, whatever it is. ``second_derivative`` says how to get one, where it is not from
    the reference.

    Returns ``<op>_fwd`` as a function that costs less to call; ``None`` without the extension.
    """
    if _extension.missing_reason() is not None:
        return None
    forward_op = getattr(torch.ops.hflow_fast, f"{op}_fwd").default
    backward_op = getattr(torch.ops.hflow_fast, f"{op}_bwd").default

    def fake_backward(*arguments: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        memory_format = format_of(arguments[0])
        gradients = tuple(empty_like_in(tensor, memory_format) for tensor in arguments[:tensors])
        return gradients if tensors > 1 else gradients[0]

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
            return backward_op(*arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> None:
            way = second_derivative or f"differentiate hflow_fast.reference.{op} instead"
            raise RuntimeError(f"hflow_fast.ops.{op} has no second derivative; {way}")

    def setup_context(ctx: Any, tensors: tuple[torch.Tensor, ...], options: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*tensors)
        ctx.options = options

    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        arguments = *ctx.saved_tensors, *gradients, *ctx.options
        # Gradients are enabled for create_graph=True only.
        return Gradient.apply(*arguments) if torch.is_grad_enabled() else backward_op(*arguments)

    torch.library.register_fake(f"hflow_fast::{op}_fwd", fake)
    torch.library.register_fake(f"hflow_fast::{op}_bwd", fake_backward)
    refuse_layouts(op, backward_op)
    for key in ("AutocastCPU", "AutocastCUDA") if autocast else ():
        register_autocast(forward_op, key)
    return register_autograd(op, backward, setup_context)


def register_autograd(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Differentiate ``<op>_fwd``, and return what calls it at the least cost.

    ``setup_context(ctx, tensors, options, output)`` keeps what ``backward(ctx, *gradients)`` needs, which returns the
    gradients of the tensors. Unlike torch.library.register_autograd this treats no default arguments, which costs time
    quadratic in the number of a schema's arguments; and it refuses by name the transforms that this kind of
    differentiation does not serve: forward mode would silently give zero.

    A call through the dispatcher enters Python once more, in the kernel registered here, which takes twice as long as
    a small kernel. What is returned goes straight to the kernel below autograd where nothing else listens: no tracing,
    no function transform, no forward mode, no autocast, no subclass of tensors. Dispatch modes still see the call.
    """
    forward_op = getattr(torch.ops.hflow_fast, f"{op}_fwd").default
    count = sum(isinstance(argument.type, torch.TensorType) for argument in forward_op._schema.arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, kernel: Callable[..., Any], options: tuple[Any, ...], *tensors: torch.Tensor) -> Any:
            output = kernel(*tensors, *options)
            setup_context(ctx, tensors, options, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            computed = backward(ctx, *gradients)
            return None, None, *(computed if isinstance(computed, tuple) else (computed,))

    # Without torch.autograd.Function.apply's search for what function transforms left behind, done here for tensors.
    apply = super(torch.autograd.Function, Function).apply

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*arguments)

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        def redispatch(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

        tensors = arguments[:count]
        refuse_transforms(op, tensors)
        if not _needs_gradient(tensors):
            return redispatch(*arguments)
        return Function.apply(redispatch, arguments[count:], *tensors)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward_op(*arguments)
        tensors = arguments[:count]
        if not _only_autograd_listens(tensors):
            return forward_op(*arguments)
        if _needs_gradient(tensors):
            return apply(below_autograd, arguments[count:], *tensors)
        return below_autograd(*arguments)

    _library.impl(f"{op}_fwd", kernel, "Autograd", with_keyset=True)
    refuse_layouts(op, forward_op)
    return call


def _only_autograd_listens(tensors: tuple[torch.Tensor, ...]) -> bool:
    for tensor in tensors:
        plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
        if not plain or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch.is_autocast_enabled(tensors[0].device.type)
    )


def _needs_gradient(tensors: Sequence[torch.Tensor]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def refuse_transforms(op: str, inputs: Sequence[torch.Tensor]) -> None:
    """Name the operation where forward mode would silently give zero, and torch.func.grad speak of our insides."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            f"hflow_fast.ops.{op} has no forward-mode derivative (jvp); differentiate hflow_fast.reference.{op} instead"
        )
    if torch._C._are_functorch_transforms_active() and _needs_gradient(inputs):
        raise RuntimeError(
            f"hflow_fast.ops.{op} does not work in torch.func.grad and its relatives; use torch.autograd, or "
            f"differentiate hflow_fast.reference.{op} instead"
        )


def refuse_layouts(op: str, overload: torch._ops.OpOverload) -> None:
    """Name the tensor that is sparse or quantized, where torch would say that it found no kernel."""
    names = [argument.name for argument in overload._schema.arguments]

    def refuse(*arguments: Any) -> None:
        for name, argument in zip(names, arguments):
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(tensor, torch.Tensor):
                    check_floating(op, **{name: tensor})

    for key in _NOT_DENSE:
        _library.impl(overload.name().removeprefix("hflow_fast::"), refuse, key)


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
