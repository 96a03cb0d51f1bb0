from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_fast.configs import load_config

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"


def test_demo_measures_draws_and_can_be_repeated(tmp_path: Path) -> None:
    """With 2 steps the model loses against the baselines, which the exit code has to say."""
    config = load_config("tiny-16")
    config["GENERAL"] |= {"STEPS": 2, "EPOCHS": None, "HOURS": None, "BATCH_SIZE": 4, "SAMPLES_PER_GRAD_EVAL": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index in range(20):
            with archive.open(f"{'held_out' if index < 5 else 'train'}/{index}.png", "w") as file:
                Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, format="png")
    command = [sys.executable, DEMO, "--config", "config.json", "--images", "images.zip", "--run", "run"]

    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 1 and "does not beat both baselines" in first.stderr, first.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["uniform_bits_per_dim"] == 8.0 and metrics["held_out_images"] == 5 and metrics["steps"] == 2
    # Independent uniform noise in 15 images: about the uniform density, plus what fitting to so few costs.
    assert 8.0 < metrics["pixel_gaussian_bits_per_dim"] < 9.0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["held_out_bits_per_dim"] == pytest.approx(last["held_out_bits_per_dim"], rel=1e-6)
    assert f"{metrics['held_out_bits_per_dim']:.3f}" in first.stdout
    assert Image.open(tmp_path / "run" / "samples.png").size == (8 * 98 + 2, 8 * 98 + 2)
    for name in ("reconstructions.png", "loss.png"):
        Image.open(tmp_path / "run" / name).load()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and "is a finished demo" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
