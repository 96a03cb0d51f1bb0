"""From a zip or a folder to a dataset, whatever is in it."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_fast.data import ImageDataset, create_dataset
from hflow_fast.data import create as create_module
from hflow_fast.data.decode import decode_image
from hflow_fast.errors import DatasetError


def png(seed: int, size: int = 6) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


IMAGES = {f"a/b{i:02d}.png": png(i) for i in range(20)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "images.zip", IMAGES)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_pixels_names_and_split_are_complete(tmp_path: Path, kind: str):
    source = write_zip(tmp_path / "s.zip", IMAGES) if kind == "zip" else write_folder(tmp_path / "s", IMAGES)
    dataset = create_dataset(source, tmp_path / "new" / "out", 4, held_out=0.2)
    assert (dataset.resolution, len(dataset.train), len(dataset.held_out)) == (4, 16, 4)
    assert dataset.names == sorted(IMAGES)
    assert sorted(dataset.train.names + dataset.held_out.names) == dataset.names
    for part in (dataset.train, dataset.held_out):
        for image, name in zip(part, part.names):
            np.testing.assert_array_equal(image.permute(1, 2, 0), decode_image(IMAGES[name], 4))
    raw = np.load(tmp_path / "new" / "out" / "images.npy")
    assert (raw.shape, raw.dtype) == ((20, 4, 4, 3), np.uint8)
    dataset.verify()
    assert left_behind(tmp_path / "new") == ["out"]


def test_the_split_depends_on_content_and_seed_only(tmp_path: Path):
    renamed = {f"{1000 - i}.png": content for i, content in enumerate(IMAGES.values())}

    def held_out(files: dict[str, bytes], out: str, seed: int) -> set[bytes]:
        source = write_folder(tmp_path / f"{out}-source", files)
        dataset = create_dataset(source, tmp_path / out, 4, held_out=0.3, seed=seed)
        return {image.numpy().tobytes() for image in dataset.held_out}

    first = held_out(IMAGES, "first", 0)
    assert len(first) == 6
    assert held_out(renamed, "renamed", 0) == first
    assert held_out(IMAGES, "seeded", 1) != first


def test_equal_images_are_on_the_same_side(tmp_path: Path):
    bitmap = io.BytesIO()
    files = {f"{i}-{copy}.png": png(i) for i in range(6) for copy in range(3)}
    Image.open(io.BytesIO(png(0))).save(bitmap, "BMP")
    source = write_folder(tmp_path / "s", files | {"0-x.bmp": bitmap.getvalue()})
    dataset = create_dataset(source, tmp_path / "o", 4, held_out=0.5)
    train, held_out = ({name.split("-")[0] for name in part.names} for part in (dataset.train, dataset.held_out))
    assert len(train) == len(held_out) == 3 and not train & held_out


@pytest.mark.parametrize("name", ["held_out", "test", "val"])
@pytest.mark.parametrize("wrapper", ["", "photos/"])
def test_folders_of_the_source_are_the_split(tmp_path: Path, name: str, wrapper: str):
    paths = ["train/a.png", "train/deep/b.png", f"{name}/c.png", "other/d.png", "e.png"]
    source = write_zip(tmp_path / "s.zip", {wrapper + path: png(i) for i, path in enumerate(paths)})
    dataset = create_dataset(source, tmp_path / "o", 4)
    assert dataset.train.names == [f"{wrapper}train/a.png", f"{wrapper}train/deep/b.png"]
    assert dataset.held_out.names == [f"{wrapper}{name}/c.png"]
    assert {item.name for item in dataset.manifest.skipped} == {f"{wrapper}other/d.png", f"{wrapper}e.png"}
    assert all("neither train/ nor held_out/" in item.reason for item in dataset.manifest.skipped)


def test_a_train_folder_alone_is_no_split(tmp_path: Path):
    source = write_folder(tmp_path / "s", {f"train/{i}.png": png(i) for i in range(4)} | {"more/x.png": png(9)})
    dataset = create_dataset(source, tmp_path / "o", 4)
    assert (len(dataset.train), len(dataset.held_out), dataset.manifest.skipped) == (4, 1, [])


def test_bad_files_are_skipped_and_listed(tmp_path: Path):
    good = {f"{i}.png": png(i) for i in range(3)}
    bad = {"cut.png": png(5, 32)[:300], "notes.txt": b"hello", "empty.jpg": b""}
    hidden = {".hidden.png": png(6), "__MACOSX/._0.png": b"junk", ".git/x.png": png(7)}
    source = write_folder(tmp_path / "s", good | bad | hidden)
    (source / "broken-link.png").symlink_to(source / "nowhere.png")
    os.mkfifo(source / "pipe.png")
    dataset = create_dataset(source, tmp_path / "o", 4)
    assert dataset.names == sorted(good)
    reasons = {item.name: item.reason for item in dataset.manifest.skipped}
    assert reasons.keys() == {*bad, "broken-link.png", "pipe.png"}
    assert "truncated" in reasons["cut.png"] and "not an image" in reasons["notes.txt"]
    assert reasons["pipe.png"] == "not a regular file"


def test_a_damaged_member_of_a_zip_is_skipped(tmp_path: Path):
    content = png(99, 32)
    source = write_zip(tmp_path / "s.zip", IMAGES | {"z.png": content})
    data = source.read_bytes()
    source.write_bytes(data.replace(content, content[:-200] + bytes(200)))
    dataset = create_dataset(source, tmp_path / "o", 4)
    assert [item.name for item in dataset.manifest.skipped] == ["z.png"]
    assert "CRC" in dataset.manifest.skipped[0].reason


def test_a_member_too_large_to_be_a_picture_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hflow_fast.data.sources._MAX_BYTES", 1000)
    source = write_zip(tmp_path / "s.zip", {"0.png": png(0), "1.png": png(1), "bomb.png": bytes(1001)})
    dataset = create_dataset(source, tmp_path / "o", 4)
    assert "too many" in dataset.manifest.skipped[0].reason


def test_a_member_that_is_larger_than_it_claims(tmp_path: Path):
    source = tmp_path / "s.zip"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", png(0))
        archive.writestr("1.png", png(1))
        archive.writestr("bomb.png", bytes(2**25))
    claim = struct.pack("<I", 2**25)
    data = source.read_bytes()
    assert data.count(claim) == 2
    source.write_bytes(data.replace(claim, struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        dataset = create_dataset(source, tmp_path / "o", 4)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert [item.name for item in dataset.manifest.skipped] == ["bomb.png"]


def test_an_encrypted_member_is_skipped(tmp_path: Path):
    source = write_zip(tmp_path / "s.zip", {"0.png": png(0), "1.png": png(1), "secret.png": png(2)})
    data = bytearray(source.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(header) + flags] |= 1
    source.write_bytes(data)
    dataset = create_dataset(source, tmp_path / "o", 4)
    assert [item.name for item in dataset.manifest.skipped] == ["secret.png"]
    assert "encrypted" in dataset.manifest.skipped[0].reason


def test_names_that_are_not_utf8(tmp_path: Path):
    source = write_folder(tmp_path / "s", {"0.png": png(0), "1.png": png(1)})
    os.rename(source / "0.png", os.fsencode(source) + b"/\xff.png")
    assert create_dataset(source, tmp_path / "o", 4).names == ["1.png", "\\udcff.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no image in it"),
        ({"a.txt": b"x", "b.png": b""}, r"no image in it.*Files skipped: 2 \(a\.txt: not an image"),
        ({"a.png": png(0), "b.png": png(0)}, "2 training and 0 held-out"),
        ({"train/a.png": png(0), "test/b.png": b""}, "1 training and 0 held-out"),
    ],
)
def test_a_source_without_enough_images(tmp_path: Path, files: dict[str, bytes], message: str):
    source = write_folder(tmp_path / "s", files)
    source.mkdir(exist_ok=True)
    with pytest.raises(DatasetError, match=message):
        create_dataset(source, tmp_path / "o", 4)
    assert left_behind(tmp_path) == ["s"]


def test_an_unusable_source(tmp_path: Path, source: Path):
    with pytest.raises(DatasetError, match="no such file or folder"):
        create_dataset(tmp_path / "missing", tmp_path / "o", 4)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(DatasetError, match="broken.zip: not a zip, or a damaged one"):
        create_dataset(broken, tmp_path / "o", 4)
    folder = write_folder(tmp_path / "s", IMAGES)
    with pytest.raises(DatasetError, match="inside the source"):
        create_dataset(folder, folder / "o", 4)
    assert left_behind(tmp_path) == ["broken.zip", "images.zip", "s"]


@pytest.mark.parametrize("options", [{"resolution": 0}, {"held_out": 0.0}, {"held_out": 1.0}])
def test_parameters_outside_their_range(tmp_path: Path, source: Path, options: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(options))):
        create_dataset(source, tmp_path / "o", **{"resolution": 4, **options})


def test_the_second_run_finds_its_dataset(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    first = create_dataset(source, tmp_path / "o", 4)
    monkeypatch.setattr("hflow_fast.data.sources.decode_image", lambda *_: pytest.fail("decoded again"))
    assert create_dataset(source, tmp_path / "o", 4).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resolution": 8}, "resolution 4 instead of 8"), ({"seed": 1}, "seed 0 instead of 1"),
     ({"held_out": 0.5}, "held_out_fraction 0.05 instead of 0.5")],
)
def test_an_existing_dataset_is_never_replaced(tmp_path: Path, source: Path, options: dict[str, float], message: str):
    create_dataset(source, tmp_path / "o", 4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    with pytest.raises(DatasetError, match=message):
        create_dataset(source, tmp_path / "o", **{"resolution": 4, **options})
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


def test_an_existing_place_that_is_something_else(tmp_path: Path, source: Path):
    create_dataset(source, tmp_path / "o", 4)
    changed = write_zip(tmp_path / "changed.zip", IMAGES | {"more.png": png(50)})
    with pytest.raises(DatasetError, match="another source"):
        create_dataset(changed, tmp_path / "o", 4)
    for name in ("folder", "file"):
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).write_text("mine")
        with pytest.raises(DatasetError, match="exists and is not a dataset"):
            create_dataset(source, tmp_path / name, 4)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_dataset_is_not_called_finished(tmp_path: Path, source: Path):
    create_dataset(source, tmp_path / "o", 4)
    with open(tmp_path / "o" / "images.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(DatasetError, match="images.npy: damaged"):
        create_dataset(source, tmp_path / "o", 4)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path):
    source = write_folder(tmp_path / "s", IMAGES)
    # Python ignores SIGXFSZ, so that writing beyond the limit fails as on a full disk.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DatasetError, match="cannot be written .*nothing is left behind"):
            create_dataset(source, tmp_path / "o", 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_behind(tmp_path) == ["s"]


def test_a_disk_full_at_the_last_moment(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(create_module.os, "fsync", full)
    with pytest.raises(DatasetError, match="No space left"):
        create_dataset(source, tmp_path / "o", 4)
    assert left_behind(tmp_path) == ["images.zip"]


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(folder: Path, *_: object) -> None:
        (folder / "images.npy").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(create_module, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        create_dataset(source, tmp_path / "o", 4)
    assert left_behind(tmp_path) == ["images.zip"]


def test_a_dataset_can_be_moved(tmp_path: Path, source: Path):
    made = create_dataset(source, tmp_path / "o", 4)
    shutil.move(tmp_path / "o", tmp_path / "moved")
    assert ImageDataset.open(tmp_path / "moved").fingerprint == made.fingerprint
