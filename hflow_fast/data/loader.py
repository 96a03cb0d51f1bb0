"""The images of the coming training steps, read while the present one is computed."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .batches import Batches
from .dataset import Images

__all__ = ["Loader"]

_AHEAD = 3  # steps: a slow read of one is hidden behind the computation of two others
_THREADS = 2  # one step's images are asked for while another's are copied


class Loader(Iterator[list[Tensor]]):
    """Micro-batches on the device, step by step, in the order of ``batches``.

    Background threads read the 8-bit pixels of the next steps, on a GPU into pinned memory, from which they are copied
    on a stream of their own; pixels become floating point on the device. The threads call nothing of CUDA, so that
    graphs may be captured meanwhile, and draw no random numbers.

    What an iterator has read ahead does not count: :meth:`state_dict` is that of ``batches`` after the step returned
    last, and a loader that loads it goes on with exactly the next one. An error in a thread is raised by ``next``, in
    its turn. Threads end with the loader, and with the interpreter.

    Args:
        images: where to read.
        batches: indices of one step's images at a time. The loader takes them out and keeps them from now on.
        batch_size: images per micro-batch; the last one of a step has fewer if they do not divide.
        device: where to put the pixels.
        share: given the number of micro-batches of a step, which of them this process needs; all when None.
        labels: one for each of ``images``, to be handed along as :attr:`labels`.
        ahead: steps read ahead, at least 1. Memory: so many steps of pixels, and one more on a GPU.

    Yields:
        Of each micro-batch of this process, (B, 3, R, R), uint8, contiguous, on ``device``.

    Raises:
        DatasetError: pixels cannot be read.
    """

    def __init__(
        self, images: Images, batches: Batches, batch_size: int, *, device: torch.device | str = "cpu",
        share: Callable[[int], Sequence[int]] | None = None, labels: Tensor | None = None, ahead: int = _AHEAD,
    ) -> None:
        if ahead < 1:
            raise ValueError(f"Loader: ahead must be at least 1, got {ahead}.")
        self.parts: tuple[Tensor, ...] = ()
        """Indices of the images of every micro-batch of the step returned last, whichever process has it."""
        self.labels: list[Tensor] = []
        """Of the images of each micro-batch that was returned last, on the device; nothing without labels."""
        self.seconds = 0.0
        """Time spent in ``next`` so far: what training has waited for data."""
        self._images = images
        self._all_labels = labels
        self._batches = batches
        self._batch_size = batch_size
        self._share = share or range
        self._ahead = ahead
        self._state = batches.state_dict()
        self._pending: deque[_Step] = deque()
        self._threads = ThreadPoolExecutor(min(_THREADS, ahead), "hflow-loader")
        self._device = torch.device(device)
        self._target = _Upload(self._device) if self._device.type == "cuda" else _Host(self._device)

    def __next__(self) -> list[Tensor]:
        start = time.perf_counter()
        self._read_ahead()
        step = self._pending[0]
        images = self._target.move(step.pixels.result())
        self._pending.popleft()  # only now: whoever is interrupted while waiting gets the same step again
        self._state, self.parts = step.state, step.parts
        if self._all_labels is not None:
            self.labels = list(self._all_labels[step.indices].to(self._device, non_blocking=True).split(step.sizes))
        self._read_ahead()
        self.seconds += time.perf_counter() - start
        return list(images.split(step.sizes))

    def state_dict(self) -> dict[str, Any]:
        """Where the steps stand that were returned, in the form of :meth:`Batches.state_dict`."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the step at which another loader, or its batches, stood.

        Raises:
            DatasetError: the state belongs to another number of images.
        """
        self._batches.load_state_dict(state)
        for step in self._pending:
            step.pixels.cancel()
        self._pending.clear()  # a read that has begun ends by itself; its buffer is not used again
        self._state = self._batches.state_dict()

    def close(self) -> None:
        """Ends the threads; waits for a read that has begun."""
        self._threads.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        while len(self._pending) < self._ahead:
            parts = next(self._batches).split(self._batch_size)
            mine = [parts[number] for number in self._share(len(parts))]
            indices = torch.cat(mine)
            buffer = self._target.buffer((len(indices), *self._images.shape))
            pixels = self._threads.submit(_read, self._images, indices.numpy(), buffer, self._target.finish)
            sizes = [len(part) for part in mine]
            self._pending.append(_Step(parts, indices, sizes, self._batches.state_dict(), pixels))


@dataclass(frozen=True)
class _Step:
    parts: tuple[Tensor, ...]
    indices: Tensor
    sizes: list[int]
    state: dict[str, Any]
    pixels: Future[Tensor]


def _read(images: Images, indices: np.ndarray, buffer: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    images.read_into(indices, buffer.numpy())
    return finish(buffer)


class _Host:
    """Pixels for the CPU, or for a device that has no streams here."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def buffer(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8)

    def finish(self, pixels: Tensor) -> Tensor:
        """Channels first. By NumPy: torch would take all cores from the computation for it."""
        return torch.from_numpy(np.moveaxis(pixels.numpy(), -1, 1).copy())

    def move(self, pixels: Tensor) -> Tensor:
        return pixels.to(self._device)


class _Upload:
    """Pinned buffers that take turns, and the stream on which they are copied to a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied: Tensor | None = None
        self._free: list[Tensor] = []

    def buffer(self, shape: tuple[int, ...]) -> Tensor:
        while self._free:
            buffer = self._free.pop()
            if buffer.shape == shape:
                return buffer
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def finish(self, pixels: Tensor) -> Tensor:
        return pixels  # the GPU puts the channels first

    def move(self, pixels: Tensor) -> Tensor:
        if self._copied is not None:
            self._stream.synchronize()  # the copy of the step before, long since done: the stream does nothing else
            self._free.append(self._copied)
        with torch.cuda.stream(self._stream):
            images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
        self._copied = pixels
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        images.record_stream(current)  # else its memory could be given to the next copy while it is still read
        return images
