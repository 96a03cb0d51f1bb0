"""HDF5 files of the original become datasets; what is not one is refused before anything is read."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from hflow_fast.data import ImageDataset, create_dataset
from hflow_fast.data import hdf5 as hdf5_module
from hflow_fast.errors import DatasetError


def pixels(count: int = 20, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write(path: Path, images: Any = None, name: str = "faces", **options: Any) -> Path:
    """As the original's importer: a group per dataset, the array X_DATA, all rows reserved first."""
    with h5py.File(path, "a") as file:
        data = pixels() if images is None else images
        array = file.create_group(name).create_dataset("X_DATA", data.shape, dtype=data.dtype, **options)
        for row, image in enumerate(data):
            array[row : row + 1, ...] = image
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "old.hdf5")


LAYOUTS = {
    "contiguous": {},
    "chunked": {"chunks": (3, 8, 8, 3)},
    "chunks that cut images": {"chunks": (7, 4, 8, 1), "compression": "gzip", "shuffle": True, "fletcher32": True},
    "lzf": {"chunks": True, "compression": "lzf"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_its_pixels_and_order(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hdf5_module, "_BLOCK", 600)  # three images, so that there are several blocks
    source = write(tmp_path / "old.hdf5", **LAYOUTS[layout])
    dataset = create_dataset(source, tmp_path / "out", 8, held_out=0.2)
    assert (len(dataset.train), len(dataset.held_out), dataset.manifest.skipped) == (16, 4, [])
    assert dataset.names == [f"faces/X_DATA[{i}]" for i in range(20)]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "images.npy"), pixels())
    dataset.verify()


def test_a_chunk_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hdf5_module, "_BLOCK", 600)
    source = write(tmp_path / "old.hdf5", chunks=(7, 8, 8, 3))
    read, starts = h5py.Dataset.__getitem__, []
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, key: starts.append(key.start) or read(self, key))
    create_dataset(source, tmp_path / "out", 8)
    assert starts == [0, 7, 14]


def test_another_resolution_is_cropped_and_resized(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    create_dataset(write(tmp_path / "old.hdf5", images), tmp_path / "out", 6, held_out=0.5)
    expected = Image.fromarray(images[1, :, 2:14]).resize((6, 6), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "images.npy")[1], np.asarray(expected))


def test_the_split_is_that_of_the_same_images_in_a_folder(tmp_path: Path, source: Path):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels()):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02d}.png")
    one = create_dataset(source, tmp_path / "one", 8, held_out=0.3)
    other = create_dataset(tmp_path / "images", tmp_path / "other", 8, held_out=0.3)
    assert one.fingerprint == other.fingerprint


def test_rows_that_were_never_written_are_skipped(tmp_path: Path):
    images = pixels()
    images[18:] = 0
    dataset = create_dataset(write(tmp_path / "old.hdf5", images), tmp_path / "out", 8)
    assert len(dataset.names) == 18
    assert [item.name for item in dataset.manifest.skipped] == ["faces/X_DATA[18]", "faces/X_DATA[19]"]
    assert "never written" in dataset.manifest.skipped[0].reason


def test_the_name_chooses_among_several(tmp_path: Path, source: Path):
    write(source, pixels()[::-1], name="a/b c")
    write(source, pixels(), name="birds")
    with pytest.raises(DatasetError, match=r"it holds birds, faces; choose one with --name"):
        create_dataset(source, tmp_path / "out", 8)
    with pytest.raises(DatasetError, match=r"no dataset 'cats'; it holds birds, faces; choose"):
        create_dataset(source, tmp_path / "out", 8, name="cats")
    dataset = create_dataset(source, tmp_path / "out", 8, name="a/b c")
    np.testing.assert_array_equal(np.load(dataset.path / "images.npy"), pixels()[::-1])
    with pytest.raises(DatasetError, match="another source"):
        create_dataset(source, tmp_path / "out", 8, name="faces")


def test_a_name_is_for_hdf5_only(tmp_path: Path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetError, match="not an HDF5 file, so it has no dataset 'faces' inside"):
        create_dataset(tmp_path / "images", tmp_path / "out", 8, name="faces")


def test_a_changed_file_is_another_source(tmp_path: Path, source: Path):
    create_dataset(source, tmp_path / "out", 8)
    create_dataset(source, tmp_path / "out", 8)
    os.utime(source, (1, 1))
    with pytest.raises(DatasetError, match="another source"):
        create_dataset(source, tmp_path / "out", 8)


def test_training_on_the_file_itself_says_what_to_do(source: Path):
    with pytest.raises(DatasetError, match="convert it once with hflow-fast dataset .*old.hdf5 OUT --resolution R"):
        ImageDataset.open(source)


def test_without_h5py(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DatasetError, match=r"needs h5py; pip install 'hflow_fast\[hdf5\]'"):
        create_dataset(source, tmp_path / "out", 8)


def test_memory_does_not_grow_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hdf5_module, "_BLOCK", 2**20)
    source = write(tmp_path / "old.hdf5", pixels(600, 128))  # 29 MB
    tracemalloc.start()
    try:
        create_dataset(source, tmp_path / "out", 128)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pixels().astype(np.float32) / 255, r"holds float32 \(20, 8, 8, 3\), but images are uint8"),
        (pixels().transpose(0, 3, 1, 2), r"holds uint8 \(20, 3, 8, 8\), but .* the channels last"),
        (pixels()[..., :1], r"\(20, 8, 8, 1\)"),
        (pixels()[0], r"\(8, 8, 3\)"),
        (pixels(0), "holds no images"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, images: np.ndarray, message: str):
    source = write(tmp_path / "old.hdf5", images)
    with pytest.raises(DatasetError, match=message):
        create_dataset(source, tmp_path / "out", 8)


def test_damaged_files(tmp_path: Path, source: Path):
    whole = source.read_bytes()
    cases = {"cut": whole[:-500], "header only": whole[:64], "signature only": whole[:8],
             "wild": whole[:48] + bytes(255 - byte for byte in whole[48:900]) + whole[900:]}
    for case, content in cases.items():
        source.write_bytes(content)
        with pytest.raises(DatasetError, match="cannot be read as HDF5|no dataset|holds no datasets"):
            create_dataset(source, tmp_path / case, 8)


def test_a_damaged_chunk_costs_its_images_only(tmp_path: Path):
    source = write(tmp_path / "old.hdf5", chunks=(1, 8, 8, 3), fletcher32=True)
    data = source.read_bytes()
    row = pixels()[7].tobytes()
    assert data.count(row) == 1
    source.write_bytes(data.replace(row, bytes([row[0] ^ 1]) + row[1:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdf5_module, "_BLOCK", 1)
        dataset = create_dataset(source, tmp_path / "out", 8)
    assert [item.name for item in dataset.manifest.skipped] == ["faces/X_DATA[7]"]


def hostile(folder: Path, case: str) -> None:
    """A file that wants other files to be read, or more memory than it is large."""
    secret = write(folder / "secret.hdf5")
    os.mkfifo(folder / "fifo")  # opening it would wait for ever
    with h5py.File(folder / "evil.hdf5", "w") as file:
        group = file.create_group("faces")
        if case == "external link":
            group["X_DATA"] = h5py.ExternalLink(str(secret), "faces/X_DATA")
        elif case == "external group":
            file["more"] = h5py.ExternalLink(str(folder / "fifo"), "faces")
        elif case == "soft link through an external one":
            file["away"] = h5py.ExternalLink(str(secret), "/")
            group["X_DATA"] = h5py.SoftLink("/away/faces/X_DATA")
        elif case == "external storage":
            group.create_dataset("X_DATA", (20, 8, 8, 3), "u1", external=[(str(folder / "fifo"), 0, 20 * 192)])
        elif case == "virtual":
            layout = h5py.VirtualLayout((20, 8, 8, 3), "u1")
            layout[:] = h5py.VirtualSource(str(folder / "fifo"), "faces/X_DATA", (20, 8, 8, 3))
            group.create_virtual_dataset("X_DATA", layout)
        elif case == "endless virtual":
            layout = h5py.VirtualLayout((20, 8, 8, 3), "u1", maxshape=(None, 8, 8, 3))
            endless = h5py.VirtualSource(str(folder / "fifo"), "faces/X_DATA", (20, 8, 8, 3), maxshape=(None, 8, 8, 3))
            layout[: h5py.h5s.UNLIMITED] = endless[: h5py.h5s.UNLIMITED]
            group.create_virtual_dataset("X_DATA", layout)
        elif case == "plugin filter":
            kind = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            kind.set_chunk((1, 8, 8, 3))
            kind.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
            space = h5py.h5s.create_simple((20, 8, 8, 3))
            h5py.h5d.create(group.id, b"X_DATA", h5py.h5t.NATIVE_UINT8, space, kind)
        elif case == "unwritten":
            group.create_dataset("X_DATA", (4_000_000, 4096, 4096, 3), "u1")
        elif case == "unwritten chunks":
            group.create_dataset("X_DATA", (4_000_000, 64, 64, 3), "u1", chunks=(1, 64, 64, 3))
        elif case == "huge chunks":
            group.create_dataset("X_DATA", (10, 16384, 16384, 3), "u1", chunks=(1, 16384, 16384, 3))
        elif case == "images by the million":
            group.create_dataset("X_DATA", (10**12, 1, 1, 3), "u1", chunks=(10**6, 1, 1, 3))
        elif case == "a group":
            group.create_group("X_DATA")
        elif case == "a type":
            group["X_DATA"] = np.dtype("u1")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("external link", "is a link, possibly to another file"),
        ("external group", "holds no datasets"),
        ("soft link through an external one", "is a link, possibly to another file"),
        ("external storage", "stored in another file .*fifo"),
        ("virtual", "a virtual array, whose pixels are in other files"),
        ("endless virtual", "a virtual array, whose pixels are in other files"),
        ("plugin filter", "compressed by filter 32015 .*h5repack"),
        ("unwritten", "larger than what was written"),
        ("unwritten chunks", "larger than what was written"),
        ("huge chunks", "chunks .* of more than 256 MiB"),
        ("images by the million", "claims 1,000,000,000,000 images"),
        ("a group", "X_DATA is not an array"),
        ("a type", "X_DATA is not an array"),
    ],
)
def test_hostile_files_are_refused_before_anything_is_read(tmp_path: Path, case: str, message: str):
    hostile(tmp_path, case)
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=message):
            create_dataset(tmp_path / "evil.hdf5", tmp_path / "out", 8)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "out").exists()


def test_an_external_group_is_refused_by_name(tmp_path: Path):
    hostile(tmp_path, "external group")
    with pytest.raises(DatasetError, match="more/X_DATA is a link, possibly to another file"):
        create_dataset(tmp_path / "evil.hdf5", tmp_path / "out", 8, name="more")
