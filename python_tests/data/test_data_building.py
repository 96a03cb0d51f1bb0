"""One process at a time makes a dataset, and what a killed one left is cleared by the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_fast.data import ImageDataset, create_dataset
from hflow_fast.data._building import building
from hflow_fast.errors import DatasetError

# Makes the dataset "out" of "images" and waits for ever at the last image.
STOPPING = """
import time
from hflow_fast.data import create_dataset, sources
whole = sources.decode_image
def decode(data, resolution):
    if data == open("images/4.png", "rb").read():
        print("waiting", flush=True)
        time.sleep(60)
    return whole(data, resolution)
sources.decode_image = decode
create_dataset("images", "out", 4)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_while_one_makes_it_another_is_refused_and_after_a_kill_goes_on(place: Path):
    with subprocess.Popen([sys.executable, "-c", STOPPING], cwd=place, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "waiting\n"
            with pytest.raises(DatasetError, match=f"is being made by process {process.pid} on .*; wait for it"):
                create_dataset(place / "images", place / "out", 4)
            assert left_behind(place) == [".out.lock", ".out.tmp", "images"]
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert left_behind(place) == [".out.lock", ".out.tmp", "images"]
    create_dataset(place / "images", place / "out", 4).verify()
    assert left_behind(place) == ["images", "out"]


def test_another_place_is_not_disturbed(place: Path):
    with building(place / "one") as one:
        (one / "images.npy").write_bytes(b"half")
        create_dataset(place / "images", place / "two", 4)
        assert (one / "images.npy").read_bytes() == b"half"


def test_what_others_put_there_is_not_removed(place: Path):
    (place / ".out.tmp").mkdir()
    (place / ".out.tmp" / "thesis.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"\.out\.tmp: exists and was not left by hflow-fast dataset"):
        create_dataset(place / "images", place / "out", 4)
    assert (place / ".out.tmp" / "thesis.txt").read_text() == "mine"
    assert not (place / ".out.lock").exists()


def test_a_link_there_is_not_followed(place: Path):
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "images.npy").write_text("mine")
    (place / ".out.tmp").symlink_to(place / "elsewhere")
    with pytest.raises(DatasetError, match="was not left by"):
        create_dataset(place / "images", place / "out", 4)
    assert (place / "elsewhere" / "images.npy").read_text() == "mine"


def test_of_several_that_start_together_one_makes_it(place: Path):
    """The others are refused, or find the dataset; nobody sees half of one."""
    start = threading.Barrier(6)

    def make(_: int) -> str:
        start.wait()
        try:
            return create_dataset(place / "images", place / "out", 4).fingerprint
        except DatasetError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(make, range(6)))
    fingerprint = ImageDataset.open(place / "out").fingerprint
    assert fingerprint in outcomes
    assert all(outcome == fingerprint or "is being made by" in outcome for outcome in outcomes)
    assert left_behind(place) == ["images", "out"]


def test_a_lock_whose_file_was_just_removed_is_taken_anew(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Its holder finishes between another's opening of the file and its taking of the lock."""
    from hflow_fast.data import _building

    take, calls = _building._take, []

    def late(descriptor: int, out: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            create = path.with_name("gone")
            path.rename(create)
            create.unlink()
        take(descriptor, out, path)

    monkeypatch.setattr(_building, "_take", late)
    with building(place / "out") as folder:
        assert (place / ".out.lock").exists()
        (folder / "images.npy").touch()
    assert len(calls) == 2 and left_behind(place) == ["images", "out"]


def test_a_dataset_made_in_the_meantime_is_found(place: Path, monkeypatch: pytest.MonkeyPatch):
    from hflow_fast.data import create as create_module

    original = create_module.building

    def slow(out: Path):
        monkeypatch.setattr(create_module, "building", original)
        create_dataset(place / "images", out, 4)
        return original(out)

    monkeypatch.setattr(create_module, "building", slow)
    create_dataset(place / "images", place / "out", 4).verify()
    assert left_behind(place) == ["images", "out"]


def test_a_file_system_without_locks(place: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(DatasetError, match="has no file locks .*make the dataset on a local disk and move it"):
        create_dataset(place / "images", place / "out", 4)
