"""``hflow-fast train`` with Glow, from the command line to the checkpoint and back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from hflow_fast.configs import load_config, preset_names
from hflow_fast.data import ImageDataset, dequantize
from hflow_fast.models import Glow
from hflow_fast.training import likelihood_bounds, load_model, read_checkpoint, read_metrics

from .conftest import hflow_fast
from .test_kill import assert_same, killed, losses, train_until  # noqa: F401  (a fixture)
from .test_train import assert_one_line_error, saved_step


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 8 × 8 pixels, in three classes of one colour each."""
    source, random = tmp_path_factory.mktemp("animals"), np.random.default_rng(0)
    for index in range(40):
        pixels = random.integers(0, 100, (8, 8, 3))
        pixels[..., index % 3] += 150
        folder = source / ("cat", "dog", "eel")[index % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    out = tmp_path_factory.mktemp("data") / "set"
    result = hflow_fast("dataset", source, out, "--resolution", 8, "--held-out", 0.2, "--labels", "folders")
    assert result.exit_code == 0 and "3 classes" in result.output, result.output
    return out


def tiny(path: Path, general: dict[str, Any] | None = None, **model: Any) -> Path:
    """A configuration of 8 × 8 pixels: two levels of two steps."""
    config = load_config("glow-tiny-16")
    config["GENERAL"] |= {"RESIZE_DATA_TO": 8, "EPOCHS": None, "STEPS": 6, "BATCH_SIZE": 4, "SAMPLES_PER_GRAD_EVAL": 8}
    config["GENERAL"] |= general or {}
    config["MODEL_PARAMETERS"] |= {"RESOLUTION": 8, "WIDTH": 4} | model
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def run(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on 5-bit pixels."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny(folder / "glow.json", {"DISCRETIZATION_BITS": 5})
    result = hflow_fast("train", "--model", "glow", "--config", config, "--data", labelled, "--run", folder / "first",
                        "--device", "cpu")
    assert result.exit_code == 0 and "finished at step 6" in result.output, result.output
    return folder / "first"


def test_a_run_and_what_it_leaves(run: Path) -> None:
    assert saved_step(run) == 6
    model, config = load_model(run)
    assert isinstance(model, Glow) and config["MODEL"] == "glow" and model.is_initialized and not model.training
    assert {path.name for path in run.iterdir()} >= {"samples", "reconstructions", "log.txt", "metrics.jsonl"}
    for folder in ("samples", "reconstructions"):
        assert (run / folder / "step_00000006.png").is_file()
    record = read_metrics(run / "metrics.jsonl")[-1]
    assert {name for name in record if name.startswith("held_out")} == {
        "held_out_bits_per_dim", "held_out_bits_per_dim/4", "held_out_bits_per_dim/2"}
    training = read_checkpoint(run, "training").training
    assert [group["step"] for group in training["optimizer"]["param_groups"]] == [6]
    assert set(training["optimizer"]["state"][0]) == {"exp_avg", "exp_inf"}


def test_bits_per_dim_are_of_the_5_bits(run: Path, labelled: Path) -> None:
    """From the density alone: −(log p(x) − D log 2⁵) / (D log 2), x = ⌊v / 2³⌋ / 2⁵ − ½ + U(0, 2⁻⁵)."""
    result = hflow_fast("evaluate", run, "--json", run.parent / "bits.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    measured = json.loads((run.parent / "bits.json").read_text())
    logged = read_metrics(run / "metrics.jsonl")[-1]["held_out_bits_per_dim"]
    assert measured["bits"] == 5 and measured["bits_per_dim"]["mean"] == pytest.approx(logged, abs=1e-6)

    model, images = load_model(run)[0], ImageDataset.open(labelled).held_out[:]
    bounds = likelihood_bounds(model, images, torch.arange(len(images)), batch_size=4, bits=5, draws=200)
    generator = torch.Generator().manual_seed(5)
    draws = []
    with torch.no_grad():
        for _ in range(200):
            bins = (images.double() / 8).floor() / 32
            x = bins - 0.5 + torch.rand(bins.shape, generator=generator, dtype=torch.float64) / 32
            latents, log_det = model.double().encode(x)
            log_p = log_det - sum(0.5 * (z.square() + np.log(2 * np.pi)).flatten(1).sum(1) for z in latents)
            draws.append(-(log_p - 192 * np.log(32)) / (192 * np.log(2)))
    expected = torch.stack(draws)
    error = (expected.var(dim=0) + bounds.total.var(dim=0)).div(200).sqrt()
    assert ((bounds.total.mean(dim=0) - expected.mean(dim=0)).abs() < 5 * error).all()
    assert float(error.max()) < 0.02


def test_a_uniform_density_takes_exactly_the_bits() -> None:
    """For the identity on [-½, ½], −log p = 0, so that each n-bit value costs n bits."""
    class Uniform(torch.nn.Module):
        dims = 12

        def __init__(self) -> None:
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(()))

        def bound(self, x: torch.Tensor) -> Any:
            assert (-0.5 <= x).all() and (x < 0.5).all()
            return type("Bound", (), {"nats": torch.zeros(len(x)), "levels": {}})

    images = torch.randint(0, 256, (3, 3, 2, 2), dtype=torch.uint8)
    for bits in (1, 3, 5, 8):
        assert (likelihood_bounds(Uniform(), images, torch.arange(3), batch_size=2, bits=bits).total == bits).all()
        steps = (dequantize(images, bits=bits).double() + 0.5) * 2**bits
        assert torch.equal(steps.floor(), (images.double() * 2**bits / 256).floor())


def test_a_run_killed_in_a_step_ends_like_one_never_interrupted(
    labelled: Path, tmp_path: Path, killed: Iterator[subprocess.Popen[str]]  # noqa: F811
) -> None:
    config = tiny(tmp_path / "glow.json", {"WARMUP_EPOCHS": 2, "STEPS": 8}, COUPLING="additive", PERMUTATION="1x1_lu")
    settings = json.loads(config.read_text())
    settings["OUTPUT"] = {"CHECKPOINT_EVERY_STEPS": 2}
    config.write_text(json.dumps(settings))
    start = "--model", "glow", "--config", config, "--data", labelled, "--run"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_until(killed, "never", 0, *start, whole)
    train_until(killed, "in_a_step", 4, *start, parts)
    assert saved_step(parts) == 2
    train_until(killed, "in_the_middle_of_writing", 2, "--run", parts, "--resume")
    train_until(killed, "never", 0, "--run", parts, "--resume")
    state = "model", "average", "training"
    ours, expected = read_checkpoint(parts, *state), read_checkpoint(whole, *state)
    assert ours.notes == expected.notes and expected.notes["step"] == 8
    for part in ("model", "average"):
        assert_same(getattr(ours, part), getattr(expected, part))
    assert_same(ours.training["optimizer"]["state"], expected.training["optimizer"]["state"])
    assert ours.training["optimizer"]["param_groups"] == expected.training["optimizer"]["param_groups"]
    assert losses(parts) == losses(whole)


def test_a_class_conditional_run(labelled: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "glow.json", CONDITIONAL=True, NUM_CLASSES=3)
    run = tmp_path / "run"
    result = hflow_fast("train", "--model", "glow", "--config", config, "--data", labelled, "--run", run, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert read_checkpoint(run).config["GENERAL"]["CLASS_NAMES"] == ["cat", "dog", "eel"]
    model, _ = load_model(run, average=False)
    assert model.num_classes == 3 and (model.embedding.weight != 0).any() and (model.classifier.weight != 0).any()
    picture = Image.open(run / "samples" / "step_00000006.png")
    assert picture.size == (8 * 98 + 2, 3 * 98 + 2)  # a row for each class
    again = hflow_fast("train", "--run", run, "--resume", "--steps", 7)
    assert again.exit_code == 0 and "finished at step 7" in again.output and "CLASS_NAMES" not in again.output


def test_classes_that_do_not_fit(labelled: Path, data: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    start = ("train", "--run", new, "--config", tiny(tmp_path / "four.json", CONDITIONAL=True, NUM_CLASSES=4))
    assert_one_line_error(hflow_fast(*start, "--data", labelled), "NUM_CLASSES is 4", "has 3 classes")
    config = load_config("glow-tiny-16")
    config["MODEL_PARAMETERS"] |= {"CONDITIONAL": True, "NUM_CLASSES": 4}
    (tmp_path / "classes.json").write_text(json.dumps(config))
    result = hflow_fast("train", "--run", new, "--config", tmp_path / "classes.json", "--data", data)
    assert_one_line_error(result, "no labels", "--labels folders", "CONDITIONAL")
    assert not new.exists()


def test_what_is_wrong_with_models(labelled: Path, run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(load_config("glow-tiny-16") | {"MODEL": "glo"}))
    presets = preset_names("glow")
    for arguments, words in (
        (("--model", "glow"), ["give --config", *presets]),
        (("--model", "realnvp"), ["--model", "hflow", "glow"]),
        (("--model", "glow", "--config", "tiny-16"), ["tiny-16: its MODEL is hflow", "glow was asked for", *presets]),
        (("--model", "hflow", "--config", presets[0]), [f"{presets[0]}: its MODEL is glow", "tiny-16"]),
        (("--config", wrong), ["MODEL: 'glo'", "hflow, glow"]),
    ):
        assert_one_line_error(hflow_fast("train", "--run", new, "--data", labelled, *arguments), *words)
        assert not new.exists()
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert_one_line_error(hflow_fast("train", "--run", copy, "--resume", "--model", "hflow"), "its MODEL is glow")
    config = json.loads((copy / "config.json").read_text())
    config["GENERAL"]["OPTIMIZER"] = "adam"
    (copy / "config.json").write_text(json.dumps(config))
    assert_one_line_error(hflow_fast("train", "--run", copy, "--resume"), "GENERAL.OPTIMIZER: adamax → adam")


def test_another_model_is_refused_by_name(labelled: Path, run: Path, tmp_path: Path) -> None:
    """Of the same resolution as the run's; weights of one model do not start another, either."""
    shutil.copytree(run, tmp_path / "copy")
    config = load_config("tiny-16")
    config["GENERAL"]["RESIZE_DATA_TO"] = 8
    parameters = config["MODEL_PARAMETERS"]
    parameters |= {key: value[1:] for key, value in parameters.items() if isinstance(value, list)} | {"CHANNELS": [3]}
    other = tmp_path / "hflow.json"
    other.write_text(json.dumps(config))
    result = hflow_fast("train", "--run", tmp_path / "copy", "--resume", "--config", other)
    assert_one_line_error(result, "MODEL: glow → hflow: cannot change during a run")
    result = hflow_fast("train", "--config", other, "--data", labelled, "--run", tmp_path / "new", "--init-from", run)
    assert_one_line_error(result, "equal MODEL and MODEL_PARAMETERS")
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_is_diagnosed(labelled: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "glow.json", {"LEARNING_RATE": 1e6, "WARMUP_EPOCHS": 0, "STEPS": 60})
    result = hflow_fast("train", "--config", config, "--data", labelled, "--run", tmp_path / "run", "--device", "cpu")
    assert_one_line_error(result, "not finite in", "last good checkpoint")
    assert re.search(r"The model's \S+ is not finite|not finite is the output|gradient that is not", result.output)


def test_info_lists_presets_by_model() -> None:
    result = hflow_fast("info")
    assert result.exit_code == 0, result.output
    of_hflow, of_glow = result.output.split("Presets of hflow\n")[1].split("\n\nPresets of glow\n")
    for model, text in (("hflow", of_hflow), ("glow", of_glow)):
        assert [line.split()[0] for line in text.strip().splitlines()] == preset_names(model)
    assert re.search(r"glow-cifar10 +32 × 32 pixels, 44,\d{3},\d{3} parameters\n", of_glow)
    assert re.search(r"glow-cifar10-conditional .* parameters, 10 classes\n", of_glow)
