"""The same computation for batch after batch, on a GPU from a CUDA graph."""

from __future__ import annotations

from typing import Any, Callable, Generator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._replay import Replay, cuda_recorder

__all__ = ["replayed", "replayed_decoder"]


def replayed(model: nn.Module, function: Callable[..., Any],
             new_recorder: Callable[[], Any] | None = None) -> Callable[..., Any]:
    """``function`` of tensors, such as ``model.decode``, for many batches of one shape; without gradients.

    On a GPU it is replayed from a CUDA graph after the first few calls, so that a batch is one launch instead of some
    thousand. It is captured again when shapes or the parameters of ``model`` change; its memory is freed with what is
    returned. Elsewhere, ``function`` is called as it is.

    Args:
        model: whose parameters ``function`` uses.
        function: of tensors; tensors, and tuples and lists of them, are its result. It draws no random numbers and does
            not wait for the device once it has been called with the same parameters.
        new_recorder: how to record, as ``Replay`` takes it; None: CUDA graphs on a GPU, else not at all.
    """
    if new_recorder is None and next(model.parameters()).device.type == "cuda":
        new_recorder = cuda_recorder
    replay: Replay[Any] = Replay(new_recorder, name=type(model).__name__)

    def work(inputs: Sequence[Tensor]) -> Generator[Callable[[], object], None, Any]:
        yield from ()  # one leg
        return function(*inputs)

    @torch.no_grad()
    def call(*inputs: Tensor) -> Any:
        key = tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
        result = replay.run(work, inputs, key)
        return tree_map(Tensor.clone, result) if replay.is_recorded else result

    return call


def replayed_decoder(
    model: nn.Module, finish: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[..., Tensor]:
    """``finish`` of the images of latents and, for a class-conditional model, labels behind them, each an argument."""
    levels = len(model.latent_shapes)
    return replayed(model, lambda *inputs: finish(model.decode(inputs[:levels], *inputs[levels:])[0]))
