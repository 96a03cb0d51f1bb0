"""Labels from folders and tables, on disk and beside the images of a step."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from hflow_fast.cli import main
from hflow_fast.data import Batches, ImageDataset, Loader, create_dataset
from hflow_fast.errors import DatasetError

ANIMALS = [f"{animal}/{i}.png" for animal in ("cat", "dog", "eel") for i in range(4)]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", ANIMALS)


def make(source: Path, labels: Any, name: str = "out", **options: Any) -> ImageDataset:
    return create_dataset(source, source.parent / name, 4, labels=labels, **{"held_out": 0.3} | options)


def table(source: Path, text: str, encoding: str = "utf-8") -> Path:
    path = source.parent / "labels.csv"
    path.write_text(text, encoding=encoding)
    return path


def classes_of(dataset: ImageDataset) -> dict[str, str]:
    return {name: dataset.classes[label] for part in (dataset.train, dataset.held_out)
            for name, label in zip(part.names, part.labels)}


def attributes_of(dataset: ImageDataset) -> dict[str, list[bool]]:
    return {name: row.tolist() for part in (dataset.train, dataset.held_out)
            for name, row in zip(part.names, part.labels)}


def test_the_folder_above_an_image_is_its_class(images: Path) -> None:
    dataset = make(images, "folders")
    assert dataset.classes == ["cat", "dog", "eel"] and dataset.attributes == []
    assert classes_of(dataset) == {name: name.split("/")[0] for name in ANIMALS}
    assert dataset.train.labels.dtype == torch.int64 and dataset.train.labels.shape == (len(dataset.train),)
    assert np.array_equal(np.load(dataset.path / "labels.npy"), np.repeat([0, 1, 2], 4))
    plain = make(images, None, "plain")
    assert plain.train.labels is None and plain.classes == [] and not (plain.path / "labels.npy").exists()
    assert torch.equal(dataset.train[:], plain.train[:]) and dataset.fingerprint != plain.fingerprint


@pytest.mark.parametrize("wrapper", ["", "animals/"])
def test_split_folders_and_others_are_no_classes(tmp_path: Path, wrapper: str) -> None:
    names = ["train/eel/deep/cat/0.png", "train/dog/1.png", "train/2.png", "test/cat/3.png", "test/4.png", "5.png"]
    source = write_images(tmp_path / "s", [wrapper + name for name in names])
    dataset = make(source, "folders")
    assert {name.removeprefix(wrapper): label for name, label in classes_of(dataset).items()} == {
        "train/eel/deep/cat/0.png": "cat", "train/dog/1.png": "dog", "test/cat/3.png": "cat"}
    reasons = {item.name.removeprefix(wrapper): item.reason for item in dataset.manifest.skipped}
    assert reasons["train/2.png"] == reasons["test/4.png"] == "in no folder that could be its class"
    assert "neither train/" in reasons["5.png"]


def test_folders_of_a_zip_in_one_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for seed, name in enumerate(ANIMALS):
            archive.writestr(f"animals/{name}", png(seed))
        archive.writestr("animals/9.png", png(99))
    dataset = make(tmp_path / "s.zip", "folders")
    assert set(classes_of(dataset).values()) == {"cat", "dog", "eel"}
    assert [item.name for item in dataset.manifest.skipped] == ["animals/9.png"]


@pytest.mark.parametrize("title", ["label", "Class"])
def test_classes_of_a_table(images: Path, title: str) -> None:
    """By whole paths or, where there is but one such file, by names; extra rows are none of our business."""
    lines = [f"file,{title}", "cat/0.png,10", ' cat/1.png , "9"', "dog/2.png,2", "nowhere.png,77", "", "dog/3.png,"]
    dataset = make(images, table(images, "\n".join(lines), "utf-8-sig"))
    assert dataset.classes == ["2", "9", "10"]
    assert classes_of(dataset) == {"cat/0.png": "10", "cat/1.png": "9", "dog/2.png": "2"}
    assert {item.reason for item in dataset.manifest.skipped} == {"no label in labels.csv"}
    words = "\n".join(["name,label", "cat/0.png,10", "cat/1.png,9", "dog/2.png,nine"])
    assert make(images, table(images, words), "words").classes == ["10", "9", "nine"]


@pytest.mark.parametrize("no", ["-1", "0"])
def test_attributes_of_a_table(tmp_path: Path, no: str) -> None:
    source = write_images(tmp_path / "s", [f"faces/{i}.png" for i in range(6)])
    rows = [f"{i}.png,{'1' if i % 2 else no},{'1' if i > 2 else no}" for i in range(6)]
    dataset = make(source, table(source, "\n".join(["image_id,Smiling,Young", *reversed(rows)])))
    assert dataset.attributes == ["Smiling", "Young"] and dataset.classes == []
    assert attributes_of(dataset) == {f"faces/{i}.png": [i % 2 == 1, i > 2] for i in range(6)}
    assert dataset.train.labels.dtype == torch.bool and dataset.train.labels.shape == (len(dataset.train), 2)


def test_celebas_own_table(tmp_path: Path) -> None:
    source = write_images(tmp_path / "s", [f"{i}.png" for i in range(4)])
    text = "4\nSmiling Young\n" + "\n".join(f"{i}.png   {'1' if i else '-1'}  -1" for i in range(4)) + "\n"
    dataset = make(source, table(source, text))
    assert attributes_of(dataset) == {f"{i}.png": [i > 0, False] for i in range(4)} and dataset.attributes[1] == "Young"


def test_rows_of_an_hdf5_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "old.hdf5", "w") as file:
        file.create_group("birds")["X_DATA"] = np.random.default_rng(0).integers(1, 256, (4, 4, 4, 3), dtype=np.uint8)
    source = tmp_path / "old.hdf5"
    text = "\n".join(["name,label", *(f"X_DATA[{i}],{'owl' if i else 'emu'}" for i in range(4))])
    assert make(source, table(source, text)).classes == ["emu", "owl"]
    with pytest.raises(DatasetError, match="an HDF5 file has no folders"):
        make(source, "folders", "other")


@pytest.mark.parametrize("text, message", [
    ("", "first line has to hold titles"),
    ("cat/0.png\n", "first line has to hold titles"),
    ("12\n", "first line has to hold titles"),
    ("name,label\nbird/0.png,1\n", "none of its rows is for a file of the source; the rows are of bird/0.png, the "
                                   "files are cat/0.png, cat/1.png, cat/2.png, …"),
    ("name,label\n0.png,1\n", "'0.png' could be cat/0.png or dog/0.png or eel/0.png; give the paths"),
    ("name,label\ncat/0.png,1\ncat/0.png,2\n", "two rows of 'cat/0.png'"),
    ("name,label\ncat/0.png,1,5\n", "the row of 'cat/0.png' has 3 cells, the titles are 2"),
    ("name,kind\ncat/0.png,red\n", "title of a column of classes has to be label, not 'kind'"),
    ("name,a,b\ncat/0.png,1,2\n", "attributes are -1 and 1, or 0 and 1, but there are '2'"),
    ("name,a,b\ncat/0.png,-1,0\n", "attributes are -1 and 1, or 0 and 1, but there are '-1', '0'"),
    ("name,a,a\ncat/0.png,1,0\n", "two columns have one title"),
    ("name,label\ncat/0.png,1\ncat/1.png,1\n", "all images are of one class, '1'"),
    ("name,label\ncat/0.png,caf\xe9\n", "not a table of labels .*utf-8"),
])
def test_tables_that_cannot_be_used(images: Path, text: str, message: str) -> None:
    path = table(images, text, "latin-1")
    with pytest.raises(DatasetError, match=message.replace("(", r"\(")):
        make(images, path)
    assert not (images.parent / "out").exists()


def test_sources_without_labels(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nothing.csv: cannot be read .*the word folders"):
        make(images, tmp_path / "nothing.csv")
    flat = write_images(tmp_path / "flat", ["0.png", "1.png"])
    with pytest.raises(DatasetError, match="no image in it.*in no folder that could be its class"):
        make(flat, "folders")
    single = write_images(tmp_path / "single", ["a.txt", "cat/0.png", "cat/1.png"])
    with pytest.raises(DatasetError, match="all images are of one class, 'cat'"):
        make(single, "folders")


def test_the_recipe_tells_labels(images: Path) -> None:
    made = make(images, "folders")
    assert make(images, "folders").path == made.path
    path = table(images, "name,label\n" + "\n".join(f"{name},{i % 2}" for i, name in enumerate(ANIMALS)))
    for other in (None, path):
        with pytest.raises(DatasetError, match=r"holds another dataset \(other labels\)"):
            make(images, other)
    by_table = make(images, path, "table")
    path.write_text(path.read_text().replace(",0", ",3"))
    with pytest.raises(DatasetError, match="other labels"):
        make(images, path, "table")
    assert len({made.fingerprint, by_table.fingerprint, make(images, path, "another").fingerprint}) == 3


def test_datasets_without_labels_are_as_they_were(images: Path) -> None:
    """To the versions that knew none, in both directions: the file does not mention them."""
    content = json.loads((make(images, None).path / "dataset.json").read_text())
    assert list(content) == ["format", "version", "recipe", "source", "sha256", "names", "held_out", "skipped"]
    assert list(content["recipe"]) == ["source_fingerprint", "resolution", "split", "held_out_fraction", "seed"]


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "the file is missing"),
    (lambda path: path.write_bytes(b""), "No data"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "Failed to read all data"),
    (lambda path: np.save(path, np.zeros(12, np.int32)), r"int32 \(12,\), dataset.json says int64"),
    (lambda path: np.save(path, np.zeros(11, np.int64)), r"int64 \(11,\), dataset.json says int64 \(12,\)"),
    (lambda path: np.save(path, np.full(12, 3)), "classes outside the 3"),
    (lambda path: np.save(path, np.array([{}] * 12), allow_pickle=True), "Object arrays"),
])
def test_damaged_labels(images: Path, damage: Any, message: str) -> None:
    dataset = make(images, "folders")
    damage(dataset.path / "labels.npy")
    with pytest.raises(DatasetError, match=f"labels.npy: damaged .*{message}"):
        ImageDataset.open(dataset.path)


def test_verify_finds_a_changed_label(images: Path) -> None:
    dataset = make(images, "folders")
    dataset.verify()
    np.save(dataset.path / "labels.npy", np.repeat([0, 2, 1], 4))
    with pytest.raises(DatasetError, match="its labels are not those that were written"):
        ImageDataset.open(dataset.path).verify()


def test_a_loader_hands_labels_along(images: Path) -> None:
    train = make(images, "folders", held_out=0.2).train
    batches, same = (Batches(len(train), 6, seed=1) for _ in range(2))
    with_labels = Loader(train, same, 4, share=lambda count: range(1, count), labels=train.labels)
    for indices in itertools.islice(batches, 5):
        (part,) = next(with_labels)
        assert torch.equal(part, train[indices[4:]])
        assert [labels.tolist() for labels in with_labels.labels] == [train.labels[indices[4:]].tolist()]
    with_labels.close()
    without = Loader(train, batches, 4)
    next(without)
    assert without.labels == []
    without.close()


@pytest.fixture
def run(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        start = ["dataset", "images", "out", "--resolution", "4", "--held-out", "0.25"]
        return CliRunner().invoke(main, [*start, *arguments])

    return invoke


def test_the_command(run: Any, tmp_path: Path, images: Path) -> None:
    result = run("--labels", "folders")
    assert (result.exit_code, result.stdout) == (0, "out: made, 9 training and 3 held-out images of 4 × 4, 3 classes\n")
    result = run()
    assert result.exit_code == 2 and "other labels" in result.stderr
    table(images, "name,wet\n" + "\n".join(f"{name},{int('eel' in name)}" for name in ANIMALS))
    (tmp_path / "out").rename(tmp_path / "first")
    assert run("--labels", "labels.csv").stdout == "out: made, 9 training and 3 held-out images of 4 × 4, 1 attribute\n"
    result = run("--labels", "nothing.csv")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: nothing.csv: cannot be read (No such file")
