"""Damaged files and files that claim too much: an error that says so, in bounded time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hflow_fast.compat import read_original
from hflow_fast.errors import CheckpointError

from .bombs import tensor_file
from .writer import as_original

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A whole file of the original's kind, of 6 kB."""
    folder = tmp_path_factory.mktemp("small")
    weights = {"a": torch.arange(3.0), "part.b": torch.ones(2, 2), "part.interp_K": torch.zeros(1)}
    return as_original(weights, {"GENERAL": {}}, folder, folder / "canary")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damage") / "model.bin"


def read(path: Path, data: bytes) -> set[str] | None:
    """The names of the tensors, or None for the error that a damaged file has to give."""
    path.write_bytes(data)
    try:
        return set(read_original(path).weights)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < 1000
        return None


def test_cut_off_anywhere(small, path):
    whole = read(path, small)
    assert whole == {"a", "part.b", "part.interp_K"}
    before_settings = len(small) - 4 - len('{"GENERAL": {}}')
    assert read(path, small[:before_settings]) == whole  # such files exist
    for size in {*range(0, len(small), 7), *range(before_settings - 20, len(small))} - {before_settings}:
        assert read(path, small[:size]) is None, size
    assert read(path, small + b"\0") is None


def test_the_originals_file_cut_off(golden_file, path):
    data = golden_file.read_bytes()
    for size in (200_000, len(data) // 2, len(data) - 1):
        assert read(path, data[:size]) is None, size


@settings(max_examples=400, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
       cut=st.tuples(st.integers(0, 2**16), st.integers(0, 40)), moved=st.booleans())
def test_changed_bytes(small, path, changes, cut, moved):
    """Bytes replaced, and a piece removed or put elsewhere: read, or refused by an error of the right kind."""
    data = bytearray(small)
    for position, byte in changes:
        data[position % len(data)] = byte
    start, size = cut[0] % len(data), cut[1]
    piece = data[start:start + size]
    del data[start:start + size]
    if moved:
        at = changes[0][0] % (len(data) + 1)
        data[at:at] = piece
    read(path, bytes(data))


@pytest.mark.parametrize(("elements", "offset", "size", "stride"), [
    (16, 0, (17,), (1,)), (16, 1, (16,), (1,)), (16, 0, (4, 4), (5, 1)), (16, 0, (4, 4), (4, 0)), (16, 0, (2,), (15,)),
    (16, 0, (0,), (1,)), (16, 0, (-4,), (1,)), (16, -1, (4,), (1,)), (16, 15, (4,), (-1,)), (16, 0, (4,), (1, 1)),
    (16, 0, (2**40, 2**40), (0, 0)), (16, 0, (1,) * 9, (1,) * 9), (16, 2**50, (4,), (1,)), (2**40, 0, (16,), (1,)),
    (15, 0, (4,), (1,)), (16, 0, (4.0,), (1,)), (16, True, (4,), (1,)), (16.0, 0, (4,), (1,)), (-16, 0, (4,), (1,)),
])
def test_tensors_that_do_not_fit_their_storage(path, elements, offset, size, stride):
    assert read(path, tensor_file(16, 4, (2, 3), (1, 2))) == {"a"}
    assert read(path, tensor_file(elements, offset, size, stride)) is None


def test_memory_time_and_stack_are_bounded(weights_file, config_file):
    """In a process of its own, whose memory is limited."""
    result = subprocess.run([sys.executable, "-m", "python_tests.compat.bombs", weights_file, config_file], cwd=ROOT,
                            capture_output=True, text=True, timeout=240, check=False)
    assert (result.stdout, result.returncode) == ("all read\n", 0), result.stderr
