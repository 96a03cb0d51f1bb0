"""The comparison with the original, as far as it goes without the original."""

from __future__ import annotations

import csv
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hflow_fast.models import HFlow, Noise

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vs_original.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vs_original", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["vs_original"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(script, tmp_path):
    (tmp_path / "hflow").mkdir()
    (tmp_path / "hflow" / "network.py").write_text("")
    return script.parse(["--original", str(tmp_path), "--config", "tiny-16", "--batch", "2", "--repeats", "2",
                         "--device", "cpu", "--results", str(tmp_path / "results")])  # fmt: skip


def test_wrong_arguments_are_explained(script, tmp_path, capsys):
    for arguments, message in ((["--original", str(tmp_path)], "clone https://github.com/timoneh/hflow"),
                               (["--original", ".", "--only", "training,speed"], "choose from training, sampling")):
        with pytest.raises(SystemExit):
            script.parse(arguments)
        assert message in capsys.readouterr().err


def test_every_mode_does_the_same_work(script, options, monkeypatch):
    model = HFlow.from_config("tiny-16").double()
    images = script.images(options, 2).double()
    model.initialize(images)
    gradients = []

    def clip_and_step(optimizer, loss, max_norm):
        gradients.append([loss, *(p.grad for group in optimizer.param_groups for p in group["params"])])

    monkeypatch.setattr(script, "clip_and_step", clip_and_step)
    for mode in ("plain", "prepared", "channels_last", "merge", "channels_last+merge"):
        side = script.Ours(script.copy.deepcopy(model), options.settings, mode, groups=2)
        # Samples would be others in another memory format.
        side.noise = Noise([None] * (2 if "merge" in mode else 1), sample=False)
        side.training([images, images.flip(0)])
        assert side.sampling(2).shape == images.shape and len(side.encoding(images)) == 3
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_results_are_appended(script, options, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    times = script.time_in_turn({"original": lambda: None, "prepared": lambda: None}, options.device, 2, warm_up=1)
    assert times == {"original": [1.0, 1.0], "prepared": [1.0, 1.0]}
    calls = []
    script.time_in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, options.device, 2, 1, settle=True)
    assert "".join(calls) == "ab" + 2 * "aabb"
    results = {"training": {"original": [2.0, 4.0, 5.0], "prepared": [1.0, 1.0, 1.5]},
               "memory": {"original": [300.0] * 3, "prepared": [100.0] * 3}}
    for _ in range(2):
        script.save(options, {"loss": 1e-15, "gradient": 1e-12}, results)
    with (options.results / "vs_original.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert [row["original_over_this"] for row in rows[:4]] == ["1.000", "4.000", "1.000", "3.000"]
    assert rows[1]["unit"] == "s" and rows[3]["unit"] == "MiB" and rows[0]["device"] and rows[0]["commit"]


def test_activity_is_shown_and_kept(script, options, capsys):
    activities = {"original": script.Activity(0.31, 13000, 81.5, 5), "graph+bf16": script.Activity(0.987, 3990, 20.25, 0)}
    script.save_activity(options, activities)
    assert "busy  98.7%, 3990 kernels in 20.2 ms, the host waits 0 times" in capsys.readouterr().out
    with (options.results / "activity.csv").open(newline="") as file:
        original, ours = csv.DictReader(file)
    assert (original["waits"], ours["busy"], ours["precision"], ours["batch"]) == ("5", "0.9870", "bf16", "2")


def test_images_are_in_range(script, options):
    images = script.images(options, 3)
    assert images.shape == (3, 3, 16, 16) and images.abs().max() < 0.52
