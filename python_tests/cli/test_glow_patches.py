"""The comparison of permutations on patches of photographs runs, goes on, and writes what it found."""

from __future__ import annotations

import csv
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from hflow_fast.data import create_dataset
from hflow_fast.metrics import FullGaussian

ROOT = Path(__file__).parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of the patches of one photograph of smooth noise."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((400, 330)).save(folder / "noise.png")
    script, out = load("scripts/photo_patches.py"), tmp_path_factory.mktemp("patches") / "patches.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["photo_patches", str(out), "--photos", str(folder)])
        assert script.main() == 0
        with pytest.raises(SystemExit):  # what is there is kept
            script.main()
    return out


def test_no_pixel_is_on_both_sides(patches: Path) -> None:
    with zipfile.ZipFile(patches) as archive:
        names = [name.removesuffix(".png").split("/") for name in archive.namelist()]
    covered = {part: np.zeros((200, 200), dtype=int) for part in ("train", "held_out")}
    for part, name in names:
        top, left = map(int, name.split("_")[-2:])
        covered[part][top:top + 8, left:left + 8] += 1
    assert ((covered["train"] > 0) & (covered["held_out"] > 0)).sum() == 0
    assert covered["held_out"].max() == 1 and covered["train"].max() == 4
    # 165 × 200 pixels are 30 whole tiles.
    assert sum((counts > 0).sum() for counts in covered.values()) == 30 * 32 * 32
    assert len(names) == len({name for _, name in names})


def test_comparison(patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                    ) -> None:
    dataset = create_dataset(patches, tmp_path / "data", 8)
    bench = load("benchmarks/glow_patches.py")
    monkeypatch.setattr(bench, "MODEL", bench.MODEL | {"STEPS": 1, "WIDTH": 4})
    page, results = tmp_path / "page.md", tmp_path / "results.csv"
    page.write_text(f"before\n{bench.MARKS[0]}\nold\n{bench.MARKS[1]}\nafter\n")
    arguments = ["glow_patches", str(dataset.path), "--steps", "2", "--draws", "1", "--results", str(results)]

    def run(*more: str) -> str:
        monkeypatch.setattr("sys.argv", [*arguments, *more])
        bench.main()
        return capsys.readouterr().out

    assert "0 of 1 models are finished" in run("--seeds", "0", "--permutations", "shuffle", "--dry-run")
    assert not results.exists()
    run("--seeds", "0", "--permutations", "shuffle")
    output = run("--seeds", "0", "1", "--permutations", "shuffle", "1x1", "--markdown", str(page))
    assert "1 of 4 models are finished, 3 to train" in output
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["permutation"], row["seed"]) for row in rows] == [
        ("shuffle", "0"), ("1x1", "0"), ("shuffle", "1"), ("1x1", "1")]
    gaussian = float(FullGaussian.fit(dataset.train).bits_per_dim(dataset.held_out).mean())
    for row in rows:
        assert float(row["gaussian"]) == pytest.approx(gaussian, abs=1e-3)
        assert float(row["gain"]) == pytest.approx(gaussian - float(row["bits_per_dim"]), abs=1e-3)
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert any(line.startswith("| Glow, 1x1 |") and f"{float(rows[1]['bits_per_dim']):.3f}" in line for line in lines)
    before = results.read_text()
    assert "4 of 4 models are finished, 0 to train" in run("--seeds", "0", "1", "--permutations", "shuffle", "1x1")
    assert results.read_text() == before
    assert "0 of 1" in run("--steps", "3", "--seeds", "0", "--permutations", "1x1", "--dry-run")
