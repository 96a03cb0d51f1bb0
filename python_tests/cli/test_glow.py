"""Every tool on a Glow, plain and class-conditional."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hflow_fast.configs import load_config
from hflow_fast.inference import studies
from hflow_fast.training import load_model

from .conftest import hflow_fast
from .test_train import assert_one_line_error


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images, 16 × 16: 12 red, 12 green, 12 blue."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for index in range(12):
            image = random.integers(0, 120, (4, 4, 3), dtype=np.uint8)
            image[..., channel] += 120
            Image.fromarray(image).resize((16, 16)).save(root / name / f"{name}{index}.png")
    return root


@pytest.fixture(scope="session")
def classes(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their dataset, with the folders as classes: blue, green, red."""
    out = tmp_path_factory.mktemp("data") / "classes"
    result = hflow_fast("dataset", pictures, out, "--resolution", 16, "--held-out", 0.2, "--labels", "folders")
    assert result.exit_code == 0, result.output
    return out


def trained(folder: Path, data: Path, **parameters: object) -> Path:
    """A run of 2 steps of a small Glow of 5 bits."""
    config = load_config("glow-tiny-16")
    config["MODEL_PARAMETERS"] |= parameters
    config["GENERAL"]["DISCRETIZATION_BITS"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    result = hflow_fast("train", "--config", folder / "config.json", "--data", data, "--run", folder / "run",
                        "--steps", 2, "--batch-size", 4, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture(scope="session")
def glow(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("glow"), classes)


@pytest.fixture(scope="session")
def conditional(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("conditional"), classes, CONDITIONAL=True, NUM_CLASSES=3)


@pytest.fixture(params=["glow", "conditional"])
def run_and_label(request: pytest.FixtureRequest) -> tuple[Path, tuple[str, ...]]:
    """A run, and the options that its tools need."""
    return request.getfixturevalue(request.param), ("--label", "red") if request.param == "conditional" else ()


def succeeded(*arguments: object) -> str:
    result = hflow_fast(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_samples(run_and_label: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    run, label = run_and_label
    succeeded("sample", run, "--out", tmp_path / "a", "--n", 3, *label)
    assert (pixels(tmp_path / "a" / "000002.png") % 8 == 0).all()  # of 5 bits
    succeeded("sample", run, "--out", tmp_path / "a", "--n", 3, "--std", 0.7, *label)  # what the configuration says
    succeeded("sample", run, "--out", tmp_path / "b", "--n", 1, "--std", "0.5,0.9", "--seed", 3, *label)
    result = hflow_fast("sample", run, "--out", tmp_path / "c", "--std", "1,1,1", *label)
    assert_one_line_error(result, "--std", "2 (one")
    assert not (tmp_path / "c").exists()


def test_samples_of_classes_in_turn(conditional: Path, tmp_path: Path) -> None:
    succeeded("sample", conditional, "--out", tmp_path / "all", "--n", 3, "--label", "blue", "--label", "2")
    for label, number in (("blue", 0), ("2", 1), ("0", 2)):
        succeeded("sample", conditional, "--out", tmp_path / label, "--n", 3, "--label", label)
        same = f"{number:06d}.png"
        assert np.abs(pixels(tmp_path / "all" / same) - pixels(tmp_path / label / same)).max() <= 8
    settings = json.loads((tmp_path / "all" / "samples.json").read_text())
    assert settings["labels"] == [0, 2] and settings["bits"] == 5


@pytest.mark.parametrize("command", [
    ("sample", "RUN", "--out", "out"), ("interpolate", "RUN", "--seeds", "1", "2", "--out", "a.png"),
    ("encode", "RUN", "PICTURES", "--out", "a.safetensors"),
    ("manipulate", "RUN", "DATA", "--data", "DATA", "--attribute", "red", "--out", "out"),
    ("study", "zero", "RUN", "DATA", "--out", "a.png"), ("study", "hold", "RUN", "DATA", "--out", "a.png"),
    ("study", "randomize", "RUN", "DATA", "--out", "a.png"), ("study", "seeds", "RUN", "--out", "a.png"),
    ("study", "walk", "RUN", "--out", "a.gif"),
], ids=" ".join)
def test_missing_and_unknown_classes_are_named(
    glow: Path, conditional: Path, pictures: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": conditional, "PICTURES": pictures / "red", "DATA": classes}
    words = [places.get(word, word) for word in command]
    assert_one_line_error(hflow_fast(*words), "--label", "class-conditional", "blue, green, red")
    assert_one_line_error(hflow_fast(*words, "--label", "cow"), "--label", "cow", "blue, green, red")
    plain = [glow if word is conditional else word for word in words]
    assert_one_line_error(hflow_fast(*plain, "--label", "red"), "--label", "no classes")
    assert not list(tmp_path.iterdir())


def test_round_trip_on_disk(run_and_label: tuple[Path, tuple[str, ...]], pictures: Path, tmp_path: Path) -> None:
    run, label = run_and_label
    out = tmp_path / "latents.safetensors"
    output = succeeded("encode", run, pictures / "green", "--out", out, *label)
    assert "12 come back bit for bit" in output
    tensors = load_file(out)
    assert [tensors[f"latent.{level}"].shape[1:] for level in range(2)] == [(6, 8, 8), (24, 4, 4)]
    succeeded("decode", run, out, "--out", tmp_path / "back")
    assert (pixels(tmp_path / "back" / "000000_green0.png") == pixels(pictures / "green" / "green0.png")).all()
    if label:
        assert (tensors["labels"] == 2).all()
        succeeded("decode", run, out, "--out", tmp_path / "other", "--label", "blue")
    else:
        assert "labels" not in tensors


def test_datasets_say_the_classes_of_their_images(conditional: Path, classes: Path, tmp_path: Path) -> None:
    succeeded("encode", conditional, classes, "--out", tmp_path / "latents.safetensors")
    assert set(load_file(tmp_path / "latents.safetensors")["labels"].tolist()) == {0, 1, 2}


def test_interpolation(run_and_label: tuple[Path, tuple[str, ...]], pictures: Path, tmp_path: Path) -> None:
    run, label = run_and_label
    ends = [pictures / "red" / "red0.png", pictures / "blue" / "blue0.png"]
    succeeded("interpolate", run, *ends, "--out", tmp_path / "way.png", "--frames", 3, *label)
    strip = pixels(tmp_path / "way.png")[2:-2:6, 2:]
    assert (strip[:, :96:6] == pixels(ends[0])).all() and (strip[:, 196:292:6] == pixels(ends[1])).all()
    succeeded("interpolate", run, "--seeds", 1, 2, "--out", tmp_path / "way.gif", "--frames", 3, *label)
    result = hflow_fast("interpolate", run, *ends, "--out", tmp_path / "y.png", "--space", "y", *label)
    assert_one_line_error(result, "--space", "endblock")


@pytest.mark.parametrize("study", [("randomize", "--draws", 2), ("zero",), ("hold", "--draws", 2), ("seeds",)],
                         ids=lambda study: study[0])
def test_studies(
    run_and_label: tuple[Path, tuple[str, ...]], classes: Path, tmp_path: Path, study: tuple[object, ...]
) -> None:
    run, label = run_and_label
    images = () if study[0] == "seeds" else (classes, "--pick", "1")
    succeeded("study", study[0], run, *images, *study[1:], "--out", tmp_path / "a.png", *label)
    assert studies.level_names(load_model(run)[0]) == ["8", "4"]


def test_walk(run_and_label: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    run, label = run_and_label
    succeeded("study", "walk", run, "--out", tmp_path / "a.gif", "--frames", 2, "--count", 1, "--steps", "1,0", *label)


def test_evaluation(run_and_label: tuple[Path, tuple[str, ...]], classes: Path, pictures: Path, tmp_path: Path) -> None:
    run, label = run_and_label
    output = succeeded("evaluate", run, "--draws", 2, "--json", tmp_path / "a.json")
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert list(numbers["levels"]) == ["4", "8"] and numbers["bits"] == 5 and "level 8" in output
    dims = {"8": 6 * 64, "4": 24 * 16}
    total = sum(numbers["levels"][name]["mean"] * count for name, count in dims.items()) / 768 + 5
    assert numbers["bits_per_dim"]["mean"] == pytest.approx(total, rel=1e-5)
    plain = tmp_path / "plain"
    succeeded("dataset", pictures, plain, "--resolution", 16, "--held-out", 0.2)
    if label:
        assert_one_line_error(hflow_fast("evaluate", run, "--data", plain), "classes", "--labels")
    else:
        succeeded("evaluate", run, "--data", plain)


def test_fid_of_the_classes_of_the_data(conditional: Path, tmp_path: Path) -> None:
    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(images / 255.0, 16).flatten(1)

    torch.jit.save(torch.jit.script(Means()), tmp_path / "means.pt")
    output = succeeded("evaluate", conditional, "--fid", tmp_path / "means.pt", "--fid-n", 6, "--cache", tmp_path)
    assert "6 samples" in output


def test_manipulation(
    run_and_label: tuple[Path, tuple[str, ...]], pictures: Path, classes: Path, tmp_path: Path
) -> None:
    run, label = run_and_label
    image = pictures / "green" / "green1.png"
    output = succeeded("manipulate", run, image, "--positive", pictures / "red", "--negative", pictures / "blue",
                       "--negative", pictures / "green", "--out", tmp_path / "a", "--strengths", "-0.1,0,0.1", *label)
    assert "red: 12 images with it, 24 without; so few" in output
    files = ["000_green1_red_-0.1.png", "000_green1_red_+0.png", "000_green1_red_+0.1.png"]
    made = {path.name for path in (tmp_path / "a").iterdir()}
    assert made == {*files, "grid.png", "vectors.safetensors"}
    assert (pixels(tmp_path / "a" / files[1]) == pixels(image)).all()
    reds = [pixels(tmp_path / "a" / name)[..., 0].mean() for name in files]
    assert reds[0] < reds[1] < reds[2]
    grid = pixels(tmp_path / "a" / "grid.png")[-98:, -3 * 98:]
    assert (grid[:-2:6, 98:98 + 96:6] == pixels(image)).all()

    vectors = tmp_path / "a" / "vectors.safetensors"
    again = succeeded("manipulate", run, image, "--vectors", vectors, "--attribute", "red", "--out", tmp_path / "b",
                      "--strengths", "0.1", "--factor", 1.6, *label)
    assert "1 attributes at 1 strengths" in again
    assert (pixels(tmp_path / "b" / files[2]) == pixels(tmp_path / "a" / files[2])).all()
    assert_one_line_error(hflow_fast("manipulate", run, image, "--vectors", vectors, "--attribute", "old", "--out",
                                     tmp_path / "c", *label), "'old'", "red")

    output = succeeded("manipulate", run, classes, "--pick", "0,1", "--data", classes, "--attribute", "red",
                       "--attribute", "blue", "--out", tmp_path / "d", "--strengths", "0,1", *label)
    assert "2 images, 2 attributes at 2 strengths, factor 1.6" in output
    assert len(list((tmp_path / "d").glob("*_red_*.png"))) == 4
    saved = load_file(tmp_path / "d" / "vectors.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"0", "1"}


def test_manipulation_of_an_hflow(run: Path, data: Path, pictures: Path, tmp_path: Path) -> None:
    image = pictures / "green" / "green1.png"
    succeeded("manipulate", run, image, "--positive", pictures / "red", "--negative", pictures / "blue", "--attribute",
              "warm", "--out", tmp_path / "out", "--strengths", "0,0.5")
    assert (pixels(tmp_path / "out" / "000_green1_warm_+0.png") == pixels(image)).all()


@pytest.mark.parametrize(("arguments", "words"), [
    ((), ["--positive and --negative, or --data"]),
    (("--positive", "RED"), ["--negative"]),
    (("--negative", "RED"), ["--positive"]),
    (("--positive", "RED", "--negative", "BLUE", "--data", "DATA"), ["comes from"]),
    (("--positive", "RED", "--negative", "BLUE", "--attribute", "a", "--attribute", "b"), ["one attribute"]),
    (("--positive", "ONE", "--negative", "BLUE"), ["1 images have it and 12 do not", "at least 2"]),
    (("--positive", "nowhere", "--negative", "BLUE"), ["nowhere", "no such file"]),
    (("--data", "DATA"), ["--attribute"]),
    (("--data", "DATA", "--attribute", "old"), ["'old'", "blue, green, red"]),
    (("--data", "PLAIN", "--attribute", "old"), ["no labels", "--labels"]),
    (("--vectors", "nowhere"), ["nowhere", "no such file"]),
    (("--data", "DATA", "--attribute", "red", "--strengths", "x"), ["--strengths", "commas"]),
    (("--data", "DATA", "--attribute", "red", "--strengths", "inf"), ["--strengths", "finite"]),
])  # fmt: skip
def test_wrong_requests_of_manipulation(
    glow: Path, data: Path, pictures: Path, classes: Path, tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    places = {"RED": pictures / "red", "BLUE": pictures / "blue", "DATA": classes, "PLAIN": data,
              "ONE": pictures / "red" / "red0.png"}
    out = tmp_path / "out"
    result = hflow_fast("manipulate", glow, pictures / "green" / "green1.png", "--out", out,
                        *(places.get(word, word) for word in arguments))
    assert_one_line_error(result, *words)
    assert not out.exists()


def test_the_folder_of_a_manipulation_has_to_be_new(glow: Path, classes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    assert_one_line_error(hflow_fast("manipulate", glow, classes, "--data", classes, "--attribute", "red", "--out",
                                     tmp_path), "not empty")


def test_files_that_are_not_images_are_named(glow: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "notes.txt").write_text("not an image")
    for index in range(2):
        Image.open(pictures / "red" / f"red{index}.png").save(tmp_path / "some" / f"{index}.png")
    output = succeeded("manipulate", glow, pictures / "green" / "green1.png", "--positive", tmp_path / "some",
                       "--negative", pictures / "blue", "--out", tmp_path / "out", "--strengths", 1)
    assert "skipped notes.txt" in output and "some: 2 images with it" in output


def test_import_says_that_it_reads_hflows(tmp_path: Path) -> None:
    source, out = tmp_path / "weights.safetensors", tmp_path / "out.safetensors"
    save_file({"w": torch.zeros(1)}, source)
    assert_one_line_error(hflow_fast("import", source, out, "--config", "glow-tiny-16"), "glow", "hflow")
    assert not out.exists()
