"""The profile of a training step and the prediction, as far as they go without the original."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from hflow_fast.bench.results import append_csv
from hflow_fast.models import HFlow

from .calls import Calls

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("profile_step")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def predict(script) -> ModuleType:
    return script.predict


@pytest.fixture
def options(script, tmp_path):
    (tmp_path / "hflow").mkdir()
    (tmp_path / "hflow" / "network.py").write_text("")
    return script.parse(["--original", str(tmp_path), "--config", "tiny-16", "--batch", "2", "--device", "cpu",
                         "--results", str(tmp_path / "results")])  # fmt: skip


@pytest.fixture
def sides(script, options):
    torch.manual_seed(0)
    images = script.vs_original.images(options, 2)
    result = {}
    for mode in ("plain", "prepared"):
        model = HFlow.from_config("tiny-16")
        model.initialize(images)
        result[mode] = script.vs_original.Ours(model, options.settings, mode)
    return result, images


def test_flops_and_bytes_are_those_of_the_shapes(predict):
    x = torch.rand(2, 6, 8, 8, requires_grad=True)
    weight = torch.rand(6, 3, 3, 3, requires_grad=True)  # two groups
    forward = 2 * (2 * 8 * 8) * (6 * 3 * 9)
    outputs = []
    (operation,) = predict.count(lambda: outputs.append(F.conv2d(x, weight, padding=1, groups=2))).operations
    assert operation.flops == forward
    assert operation.bytes == 4 * (2 * x.numel() + weight.numel())
    backward = predict.count(lambda: outputs[0].backward(torch.ones_like(outputs[0]))).operations
    assert [op.flops for op in backward if op.name == "convolution_backward"] == [2 * forward]

    a = torch.rand(3, 4, 5)
    total = torch.zeros(3, 4, 4)
    (product,) = predict.count(lambda: total.baddbmm_(a, a.mT)).operations
    assert product.flops == 2 * 3 * 4 * 5 * 4


def test_exponential_follows_the_norm(predict):
    matrix = torch.zeros(2, 8, 8)
    matrix[0, 0, 0], matrix[1, 0, 0] = 2.0, 10.0  # no squaring, and two
    (operation,) = [op for op in predict.count(lambda: torch.matrix_exp(matrix)).operations if op.flops]
    assert operation.flops == (5 + 5 + 2) * 2 * 8**3 and operation.exact


def test_prediction_is_the_longest_of_three_times(predict):
    device = predict.Device("a", {"fp32": 10.0, "tf32": 20.0, "bf16": 40.0}, 100.0, 4.0, (0.5, 0.5), "")
    operation = predict.Operation
    convolution = operation("convolution", 1e12, 8 * 2**20, False)
    times = predict.predict(predict.Work([convolution]), device, "tf32", False)
    assert times == pytest.approx((100.0, 100.0))
    rotation = operation("bmm", 1e12, 8 * 2**20, True)
    assert predict.predict(predict.Work([rotation]), device, "tf32", False) == pytest.approx((200.0, 200.0))
    copy = operation("copy_", 0.0, 900_000_000, False)  # at 90 GB/s
    assert predict.predict(predict.Work([], [copy], groups=4), device, "fp32", True) == pytest.approx((2.5, 2.5))
    small = predict.Work([operation("add", 0.0, 1000, False)] * 1000)
    assert predict.predict(small, device, "fp32", False) == pytest.approx((6.0, 10.0))
    assert predict.predict(small, device, "fp32", True) == pytest.approx((1.5, 2.5))


def test_counts_are_those_of_the_tests(script, predict, sides):
    runners, images = sides
    works, operations = predict.works_of(runners, images, 4)
    model = runners["plain"].model
    model.train()
    with Calls() as calls:
        model.loss(images).mean()
    assert operations["plain"]["forward"] == calls.work
    plain, prepared = works["training"]["plain"], works["training"]["prepared"]
    assert prepared.kernels < 0.7 * plain.kernels and 0 < prepared.flops < plain.flops
    assert operations["prepared"]["optimizer"] < 100


def test_every_operation_is_where_it_belongs(script, sides):
    runners, images = sides
    for mode, runner in runners.items():
        table, alone, wall = script.profile_side(runner, [images], None, images.device)
        assert sum(line[0] for line in table.values()) == pytest.approx(wall) and 0 < alone
        calls = {category: line[2] for category, line in table.items()}
        for category in (script.CONVOLUTION, script.CONVOLUTION_BACKWARD, script.EXPONENTIAL, script.MAPS, script.FLOW,
                         script.NORM, script.RESAMPLE, script.ACTIVATION, script.OPTIMIZER):
            assert calls[category] > 0, (mode, category)
        assert calls[script.OTHER] < 0.4 * sum(calls.values())
        assert calls[script.WEIGHTS] > 250 if mode == "plain" else calls[script.WEIGHTS] < 20


def test_backward_follows_forward(script):
    """A plain multiplication has no name of its own: forward and backward, the region decides."""
    x = torch.rand(4, 4, requires_grad=True)
    multiply = script._recorded(lambda x: x * 2.0, script.NORM)
    with profile() as profiler:
        multiply(x).sum().backward()
    table = script.categorize(profiler.events())
    assert table[script.NORM][2] == 2


def test_tables_come_from_the_files(script, options):
    run = {"config": "tiny-16", "batch": 2, "device": "d", "threads": 1, "torch": "2", "commit": "c"}
    rows = [run | {"side": side, "part": "forward", "operations": 1000 * number, "date": f"2026-01-0{day}"}
            for day in (1, 2) for side, number in (("original", 4 * day), ("prepared", day))]  # fmt: skip
    append_csv(options.results / "operations.csv", rows[:2])
    append_csv(options.results / "operations.csv", rows[2:])
    with (options.results / "operations.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    tables = script.tables(options.results)
    assert list(tables) == ["operations"] and "| forward | 8,000 | 2,000 |" in tables["operations"]
    page = options.results / "page.md"
    page.write_text("a\n<!-- operations -->\nold\n<!-- /operations -->\nb\n")
    script.main(["--no-run", "--results", str(options.results), "--markdown", str(page)])
    assert page.read_text().startswith("a\n<!-- operations -->\ntiny-16, batch 2; d") and "old" not in page.read_text()
    with pytest.raises(ValueError, match="must have <!-- operations -->"):
        script.fill("a", tables)


def test_the_page_takes_every_table(script):
    names = ("vs_original", "profile", "operations", "prediction")
    filled = script.fill(script.PAGE.read_text(), dict.fromkeys(names, "text"))
    assert all(f"<!-- {name} -->\ntext\n<!-- /{name} -->" in filled for name in names)


def test_each_work_is_shown_from_its_newest_run(script, tmp_path):
    columns = "config,batch,groups,precision,work,side,unit,q20,q50,q80,original_over_this,device,threads,torch,commit,date"
    rows = [("sampling", "original", "1.00", "old", "2026-01-01"), ("sampling", "gone", "7.00", "old", "2026-01-01"),
            ("training", "original", "1.00", "old", "2026-01-01"), ("training", "bf16", "4.00", "old", "2026-01-01"),
            ("sampling", "original", "1.00", "new", "2026-01-02"), ("sampling", "bf16", "3.00", "new", "2026-01-02")]
    lines = [f"A,4,4,fp32,{work},{side},s,1,1,1,{ratio},d,2,t,{commit},{date}" for work, side, ratio, commit, date in rows]
    (tmp_path / "vs_original.csv").write_text("\n".join([columns, *lines, ""]))
    caption, _, _, _, *shown = script.tables(tmp_path)["vs_original"].splitlines()
    assert caption == "A, batch 4 × 4; d, 2 threads, torch t, commit old, new, 2026-01-02."
    assert [(line.split("|")[1].strip(), line.split("|")[2].strip(), line.split("|")[-2].strip()) for line in shown] == [
        ("training", "original", "1.00"), ("training", "bf16", "4.00"),
        ("sampling", "original", "1.00"), ("sampling", "bf16", "3.00")]  # fmt: skip


def test_prediction_is_said_to_be_one(predict, capsys):
    work = predict.Work([predict.Operation("add", 0.0, 1000, False)])
    predict.print_prediction("tiny-16", {"training": {"original": work, "prepared": work}}, 2)
    text = capsys.readouterr().out
    assert "PREDICTION" in text and "not timed" in text and "RTX 3090" in text and "whitepaper" in text
    assert math.prod(text.count(word) for word in ("fp32", "tf32", "bf16", "graph")) > 0
