"""Images read ahead of training: the right ones, in order, with nothing lost or drawn, and threads that end."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hflow_fast.data import Batches, ImageDataset, Images, Loader, create_dataset
from hflow_fast.data import loader as loader_module
from hflow_fast.errors import DatasetError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "images").mkdir()
    for i in range(26):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:02d}.png")
    return create_dataset(folder / "images", folder / "dataset", 4, held_out=0.1).path  # 23 training images


@pytest.fixture
def images(path: Path) -> Images:
    return ImageDataset.open(path).train


def batches(seed: int = 3) -> Batches:
    return Batches(23, 6, seed=seed)


@contextlib.contextmanager
def loading(images: Images, batch_size: int = 2, **options):
    loader = Loader(images, batches(), batch_size, **options)
    try:
        yield loader
    finally:
        loader.close()


def expected(images: Images, count: int, batch_size: int = 2) -> list[list[torch.Tensor]]:
    """What training read before there was a loader."""
    return [list(images[index].split(batch_size)) for index in itertools.islice(batches(), count)]


def same(left: list[list[torch.Tensor]], right: list[list[torch.Tensor]]) -> bool:
    return [len(step) for step in left] == [len(step) for step in right] and all(
        torch.equal(a, b) for one, two in zip(left, right) for a, b in zip(one, two)
    )


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 6])
def test_steps_are_those_of_the_batches_over_epochs(images: Images, batch_size: int, ahead: int):
    with loading(images, batch_size, ahead=ahead) as loader:
        steps = list(itertools.islice(loader, 10))
    assert same(steps, expected(images, 10, batch_size))
    assert all(part.dtype == torch.uint8 and part.is_contiguous() for step in steps for part in step)


def test_what_is_returned_belongs_to_the_caller(images: Images):
    with loading(images, ahead=1) as loader:
        steps = list(itertools.islice(loader, 4))
        for part in steps[0]:
            part.fill_(0)
        assert same(steps[1:] + [next(loader)], expected(images, 5)[1:])


def test_a_process_reads_its_share_only(images: Images, monkeypatch: pytest.MonkeyPatch):
    read, asked = Images.read_into, []
    monkeypatch.setattr(Images, "read_into", lambda self, index, out: asked.append(index) or read(self, index, out))
    everything = expected(images, 5)
    for rank in range(2):
        with loading(images, share=lambda count: range(rank, count, 2), ahead=2) as loader:
            steps = list(itertools.islice(loader, 5))
            assert same(steps, [step[rank::2] for step in everything])
            assert [len(part) for part in loader.parts] == [2, 2, 2]
            assert torch.equal(images[loader.parts[1]], everything[4][1])
    assert {len(index) for index in asked} == {2, 4}


@pytest.mark.parametrize("done", range(9))
def test_a_restart_goes_on_after_what_was_returned(images: Images, done: int):
    with loading(images, ahead=4) as loader:
        list(itertools.islice(loader, done))
        state = json.loads(json.dumps(loader.state_dict()))
    straight = batches()
    list(itertools.islice(straight, done))
    assert state == straight.state_dict()
    other = Loader(images, batches(seed=99), 3, ahead=1)
    next(other)  # and what this one has read ahead is forgotten
    other.load_state_dict(state)
    assert same(list(itertools.islice(other, 6)), expected(images, done + 6, 3)[done:])
    other.close()


def test_the_state_of_another_dataset_is_refused(images: Images):
    with loading(images) as loader, pytest.raises(DatasetError, match="the order of 9 images cannot go on with 23"):
        loader.load_state_dict(Batches(9, 3).state_dict())


def test_no_more_is_read_than_was_asked_for(images: Images, monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr(loader_module, "_read", lambda _, index, buffer, finish: started.append(index) or buffer)
    with loading(images, ahead=3) as loader:
        assert not started
        for done in range(1, 5):
            next(loader)
            assert len(loader._pending) == 3 and len(started) <= done + 3


def test_no_random_numbers_are_drawn(images: Images):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with loading(images) as loader:
        first = list(itertools.islice(loader, 8))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(123)
    with loading(images) as loader:
        assert same(list(itertools.islice(loader, 8)), first)


@pytest.mark.parametrize("fault", ["shorter", "unreadable"])
def test_an_error_comes_in_its_turn_and_stays(images: Images, fault: str, monkeypatch: pytest.MonkeyPatch):
    third, preadv = [], os.preadv
    third.extend(list(itertools.islice(batches(), 3))[2].tolist())
    bad = {int(images._pixels.offset + images._positions[i] * 48) for i in third}

    def faulty(file: int, buffers: list, offset: int) -> int:
        if offset in bad and fault == "unreadable":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, offset) - (offset in bad)

    monkeypatch.setattr(os, "preadv", faulty)
    message = {"shorter": "images.npy: damaged .*shorter", "unreadable": r"images.npy: cannot be read \(Input/output"}
    with loading(images) as loader:
        assert same([next(loader), next(loader)], expected(images, 2))
        for _ in range(2):
            with pytest.raises(DatasetError, match=message[fault]):
                next(loader)
        assert loader.state_dict()["position"] == 12


def test_who_is_interrupted_while_waiting_gets_the_same_step_again(images: Images, monkeypatch: pytest.MonkeyPatch):
    go, read = threading.Event(), loader_module._read
    monkeypatch.setattr(loader_module, "_read", lambda *arguments: go.wait() and read(*arguments))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with loading(images) as loader:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                next(loader)
            go.set()
            assert same([next(loader), next(loader)], expected(images, 2))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_waiting_is_measured_and_hidden_by_computation(images: Images, monkeypatch: pytest.MonkeyPatch):
    read = loader_module._read
    monkeypatch.setattr(loader_module, "_read", lambda *arguments: time.sleep(0.1) or read(*arguments))
    with loading(images, ahead=1) as loader:
        next(loader)
        assert 0.1 <= loader.seconds < 5
        waited = loader.seconds
        time.sleep(0.3)
        next(loader)
        assert loader.seconds - waited < 0.1


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hflow-loader")]


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_threads_end_with_the_loader(images: Images, how: str):
    loader = Loader(images, batches(), 2)
    next(loader)
    threads = loader_threads()
    assert threads
    if how == "closed":
        loader.close()
    del loader
    gc.collect()
    for thread in threads:
        thread.join(5)
    assert not loader_threads()


LEAVING = """
import sys, time
from hflow_fast.data import Batches, ImageDataset, Loader, loader
read = loader._read
loader._read = lambda *arguments: time.sleep(0.2) or read(*arguments)
images = ImageDataset.open(sys.argv[1]).train
steps = Loader(images, Batches(len(images), 6), 2, ahead=2)
next(steps)
raise KeyboardInterrupt
"""


def test_the_interpreter_ends_in_the_middle_of_reading(path: Path):
    ended = subprocess.run([sys.executable, "-c", LEAVING, str(path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGINT and ended.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_a_dataset_gives_its_files_back(path: Path):
    before = len(os.listdir("/proc/self/fd"))
    dataset = ImageDataset.open(path)
    assert len(os.listdir("/proc/self/fd")) > before
    del dataset
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_there_is_always_a_step_ahead(images: Images):
    with pytest.raises(ValueError, match="ahead must be at least 1"):
        Loader(images, batches(), 2, ahead=0)


class Stream:
    """A stream that has only done what somebody has waited for."""

    done = 0
    waited = 0

    def synchronize(self) -> None:
        Stream.done += 1

    def wait_stream(self, other: Stream) -> None:
        Stream.waited += 1


def test_pinned_buffers_take_turns(images: Images, monkeypatch: pytest.MonkeyPatch):
    """The road of a GPU with everything of CUDA acted: a buffer comes back only after its copy was waited for."""
    made: list[torch.Tensor] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory and dtype == torch.uint8
        made.append(torch.empty(shape, dtype=dtype))
        return made[-1]

    cuda = SimpleNamespace(Stream=lambda _: Stream(), stream=lambda _: contextlib.nullcontext(),
                           current_stream=lambda _: Stream())
    acted = SimpleNamespace(empty=empty, uint8=torch.uint8, cat=torch.cat, device=torch.device, cuda=cuda)
    steps_expected = expected(images, 8)
    monkeypatch.setattr(loader_module, "torch", acted)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(Stream, "done", 0)
    monkeypatch.setattr(Stream, "waited", 0)
    with loading(images, ahead=2) as loader:
        loader._target = loader_module._Upload(torch.device("cpu"))
        steps = []
        for number in range(8):
            steps.append(next(loader))
            assert (Stream.done, Stream.waited) == (number, number + 1)
    assert len(made) == 3
    assert same(steps, steps_expected)
