from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hflow_fast._extension import _INNER_OPS, _OPS
from hflow_fast.bench import OPS, Case, Timer, append_rows, cases_of, markdown, newest_rows, read_rows, rows_of, table
from hflow_fast.bench import plain
from hflow_fast.bench.results import COLUMNS

from .conftest import hflow_fast

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]


def test_times_a_case_keeps_it_and_shows_it(tmp_path: Path) -> None:
    options = ("--ops", "lu", "--cases", "28×4×4", "--repeats", 2, "--no-compile", "--device", "cpu",
               "--results", tmp_path)
    for _ in range(2):
        result = hflow_fast("bench", *options, "--plot", tmp_path / "ops.png", "--markdown", tmp_path / "page.md")
        assert result.exit_code == 0, result.output
    assert "28×4×4" in result.output and "geometric means" in result.output
    with (tmp_path / "lu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["work"] for row in rows] == ["forward", "forward + backward"] * 2
    for row in rows:
        times = {side: [float(row[f"{side}_us_q{q}"]) for q in (20, 50, 80)] for side in ("ours", "eager", "copy")}
        assert all(0 <= low <= middle <= high for low, middle, high in times.values())
        assert float(row["ratio_eager"]) == pytest.approx(times["eager"][1] / times["ours"][1], abs=0.02)
        assert row["compile_us_q50"] == row["ratio_compile"] == row["notes"] == ""
        assert row["threads"] == str(torch.get_num_threads()) and row["torch"] == torch.__version__
    assert Image.open(tmp_path / "ops.png").size[0] > 300
    page = (tmp_path / "page.md").read_text()
    newest = rows[-1]
    assert f"| 28×4×4 | forward + backward | {newest['ours_us_q50']} | {newest['eager_us_q50']} " in page

    shown = hflow_fast("bench", "--repeats", 0, "--results", tmp_path)
    assert shown.exit_code == 0 and newest["ours_us_q20"] in shown.output


def test_a_dry_run_keeps_nothing(tmp_path: Path) -> None:
    result = hflow_fast("bench", "--ops", "lu,actnorm", "--cases", "4×4", "--repeats", 1, "--no-compile", "--dry-run",
                        "--device", "cpu", "--results", tmp_path / "none")
    assert result.exit_code == 0, result.output
    assert "lu" in result.output and "actnorm" in result.output and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ops", "fft"), "'fft' is not one of actnorm"),
        (("--cases", "Mars"), "no case holds 'Mars'"),
        (("--repeats", 0, "--markdown"), "there are no results"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    result = hflow_fast("bench", "--device", "cpu", "--results", tmp_path, *options)
    assert result.exit_code and message in result.output and "Traceback" not in result.output


def test_a_file_of_other_columns_is_not_appended_to(tmp_path: Path) -> None:
    (tmp_path / "lu.csv").write_text("op,case\nlu,old\n")
    result = hflow_fast("bench", "--ops", "lu", "--cases", "28×4×4", "--repeats", 1, "--no-compile", "--device", "cpu",
                        "--results", tmp_path)
    assert result.exit_code and "not a file of hflow-fast bench" in result.output
    assert (tmp_path / "lu.csv").read_text() == "op,case\nlu,old\n"


def test_the_kept_results_can_be_read() -> None:
    rows = read_rows(REPOSITORY / "benchmarks" / "results")
    assert rows and all(tuple(row) == COLUMNS for row in rows)
    chosen = newest_rows(rows)
    assert markdown(chosen).count("\n| ") > len(chosen) and len(table(chosen).splitlines()) > len(chosen)


def test_every_operation_with_a_kernel_is_timed_and_has_a_script() -> None:
    assert set(_OPS) <= set(OPS)
    scripts = {path.stem.removeprefix("bench_") for path in (REPOSITORY / "benchmarks").glob("bench_*.py")}
    assert scripts == {*OPS, *_INNER_OPS}


@pytest.mark.parametrize("op", OPS)
def test_both_sides_compute_the_same(op: str) -> None:
    small = {"28×8×8", "HFlow 4×8×8×8", "Glow 64×48×4×4", "A-128 28", "4×512×8×8", "down 4×512×8×8", "up 4×512×8×8"}
    given = [case for case in cases_of([op], CPU) if case.name in small]
    assert {case.work for case in given} == {"forward", "forward + backward"}
    for case in given:
        for a, b in zip(_flat(case.ours()()), _flat(case.eager()()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_bytes_are_those_of_the_tensors() -> None:
    by_name = {(case.name, case.work): case.bytes for case in cases_of(["haar"], CPU)}
    x = 4 * 3 * 128 * 128 * 4
    assert by_name["HFlow 4×3×128×128", "forward"] == 2 * x + 4 * 4  # and a log-det per sample
    assert by_name["HFlow 4×3×128×128", "forward + backward"] == 4 * x + 2 * 4 * 4
    coupling = {(case.name, case.work): case.bytes for case in cases_of(["coupling"], CPU)}
    assert coupling["HFlow 4×3×128×128", "forward"] == 4 * x + 4 * 4  # raw is twice x


def test_compiles_and_reports_what_cannot_be_compiled() -> None:
    def fine(module, wrap):
        return wrap(lambda: torch.ones(8).sin())

    def broken(module, wrap):
        def function():
            if module is plain and torch.compiler.is_compiling():
                raise NotImplementedError("not this one")
            return torch.ones(8)

        return wrap(function)

    for implement, compiles in ((fine, True), (broken, False)):
        case = Case("sine", "8", "forward", "float32", 64, implement)
        (timing,) = Timer(CPU, 2, shortest=1e-5).time(case)
        assert timing.ratio("eager") > 0 and math.isclose(timing.floor, 64e-3 / timing.bandwidth)
        assert (timing.ratio("compile") is not None) == compiles == (not timing.notes)
        (row,) = rows_of([timing], CPU)
        assert ("compile failed" in row["notes"]) == (not compiles)
        assert "compile failed" not in table([row]) or not compiles


def test_rows_survive_the_file(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, "")
    row |= {"op": "haar", "case": "1×1", "device": "d", "threads": "2", "date": "2026-01-01"}
    later = row | {"ours_us_q50": "3.0", "date": "2026-01-02"}
    append_rows([row], tmp_path)
    append_rows([later, later | {"threads": "1", "date": "2026-01-01"}], tmp_path)
    rows = read_rows(tmp_path)
    assert rows[:2] == [row, later] and newest_rows(rows) == [later]
    assert newest_rows(rows, threads=1) == [rows[2]] and newest_rows(rows, device="other") == []


def test_a_script_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "bench_lu.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert result.returncode == 0 and "--repeats" in result.stdout, result.stderr


def _flat(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)
