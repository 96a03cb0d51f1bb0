"""The comparison of stock and accelerated models, at the smallest size."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LIBRARIES = {"normflows": "normflows", "freia": "FrEIA", "nflows": "nflows"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("dropin")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("library", LIBRARIES)
def test_stock_and_accelerated_take_turns(script, library, tmp_path, capsys):
    pytest.importorskip(LIBRARIES[library])
    script.main(["--small", "--dry-run", "--libraries", library, "--parts", "training,sampling,flow", "--device", "cpu",
                 "--results", str(tmp_path)])  # fmt: skip
    output = capsys.readouterr().out
    assert output.count("agree: losses to") == 2  # whole, and the flow part
    for work in ("training", "sampling"):
        for network in ("8", "flow"):
            lines = [line for line in output.splitlines() if line.startswith(f"{library:<12} {work:<9} {network:>5}")]
            assert [line.split()[3] for line in lines] == ["stock", "accelerated"]
    assert not list(tmp_path.iterdir())


def test_glow_beside_normflows(script, capsys):
    pytest.importorskip("normflows")
    script.main(["--small", "--dry-run", "--parts", "glow", "--device", "cpu"])
    assert capsys.readouterr().out.count("hflow_fast.models.Glow") == 2


def test_memory_of_kept_and_rebuilt_activations(script, tmp_path):
    script.main(["--small", "--parts", "memory", "--device", "cpu", "--results", str(tmp_path)])
    with (tmp_path / "dropin.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["work"], row["side"]) for row in rows] == [
        ("peak", "stock"), ("peak", "reversible"), ("activations", "stock"), ("activations", "reversible")]
    assert all(row["unit"] == "MiB" and row["depth"] == "4" and row["commit"] for row in rows)


def test_chains_are_the_same_function(script):
    shape = script.Shape(levels=2, depth=2, resolution=8, batch=2, width=4)
    torch.manual_seed(0)
    chains = [script.Chain(shape, reversible).double() for reversible in (False, True)]
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5
    chains[0](x)
    with torch.no_grad():
        for parameter, other in zip(chains[0].parameters(), chains[1].parameters(), strict=True):
            parameter.add_(0.1 * torch.randn_like(parameter))
            other.copy_(parameter)
        for buffer, other in zip(chains[0].buffers(), chains[1].buffers(), strict=True):
            other.copy_(buffer)
    torch.testing.assert_close(chains[1](x), chains[0](x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", [1.0 + 1e-5, float("nan")])
@pytest.mark.parametrize("fault", ["loss", "gradient", "sample"])
def test_other_functions_are_not_timed(script, fault, factor):
    torch.manual_seed(0)

    def subject(loss: float, gradient: float, sample: float):
        model = torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.eye_(model.weight)
        model.weight.register_hook(lambda value: value * gradient)
        return script.Subject(model, lambda model, x: loss * model(x).mean(),
                              lambda model, count: sample * model(torch.ones(count, 3)))

    right = {"loss": 1.0, "gradient": 1.0, "sample": 1.0}
    x = torch.rand(2, 3)
    assert max(script.compare({"stock": subject(**right), "accelerated": subject(**right)}, x, 0).values()) == 0.0
    wrong = right | {fault: factor}
    with pytest.raises(SystemExit, match="the two differ"):
        script.compare({"stock": subject(**right), "accelerated": subject(**wrong)}, x, 0)


def test_wrong_arguments_are_explained(script, tmp_path, capsys):
    for arguments, message in ((["--libraries", "zuko"], "choose from normflows, freia, nflows, glow_pytorch"),
                               (["--parts", "speed"], "choose from training, sampling, flow, glow, memory"),
                               (["--glow-pytorch", str(tmp_path)], "clone https://github.com/rosinality/glow-pytorch"),
                               (["--libraries", "glow_pytorch"], "needs --glow-pytorch DIR")):  # fmt: skip
        with pytest.raises(SystemExit):
            script.parse(arguments)
        assert message in capsys.readouterr().err


def test_the_page_takes_the_tables(script, tmp_path):
    path = tmp_path / "dropin.csv"
    run = {"device": "d", "threads": 2, "torch": "2", "hflow_fast": "0", "commit": "c", "date": "2026-01-01"}
    options = script.parse(["--no-run"])
    shape = script.Shape()
    rows = [script.row("nflows", shape, "training", side, "s", [0.9 * time, time, 1.1 * time], 3.0 / time, options) | run
            for side, time in (("stock", 3.0), ("accelerated", 2.0))]  # fmt: skip
    rows += [script.row("memory", shape, "peak", side, "MiB", [value] * 3, 100 / value, options) | run
             for side, value in (("stock", 100.0), ("reversible", 25.0))]  # fmt: skip
    script.append_csv(path, rows)
    tables = script.tables(path)
    assert "| width 512, K 16 | training | 3000 (2700–3300) | 2000 (1800–2200) | 1.50× |" in tables["dropin"]
    assert "| width 512, K 16 | peak | 100 | 25 | 0.25 |" in tables["dropin-memory"]
    page = tmp_path / "page.md"
    page.write_text(script.PAGE.read_text())
    script.main(["--no-run", "--results", str(tmp_path), "--markdown", str(page)])
    assert "1.50×" in page.read_text()
