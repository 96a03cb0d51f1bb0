"""The benchmark of the loader runs and writes rows that can be judged later."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_reader_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import loader

    monkeypatch.setattr(loader, "PACES", (None, 5000))
    monkeypatch.setattr(loader, "PNG_FILES", 8)
    options = ["--images", "24", "--resolution", "8", "--images-per-step", "8", "--micro-batch", "4", "--seconds", "0"]
    for _ in range(2):
        loader.main([*options, "--folder", str(tmp_path), "--results", str(tmp_path / "results")])
    with open(tmp_path / "results" / "loader.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 3
    assert {row["reader"] for row in rows} == {"map", "loader", "PNG"}
    for row in rows:
        assert 0 < float(row["images_per_s_q20"]) <= float(row["images_per_s_q50"]) <= float(row["images_per_s_q80"])
        assert row["device"] and row["torch"] and row["commit"] and row["date"] and row["disk"]
        assert not row["pace"] or float(row["images_per_s_q80"]) < 5000
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert capsys.readouterr().out.count("loader") == 8


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import loader

    with pytest.raises(SystemExit, match="are free and 196608000.0 GB needed"):
        loader.main(["--images", "1000000000000", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())
