"""What docs/model.md and its figures say of the presets is what the models are."""

from __future__ import annotations

import functools
import importlib.util
import re
from html import unescape
from pathlib import Path

import pytest
import torch

from hflow_fast.configs import preset_names
from hflow_fast.models import HFlow

ROOT = Path(__file__).parents[2]

PARTS = {
    "encoders": ("encoder", "code_encoder"),
    "decoders": ("decoder", "code_decoder", "code_projection", "style"),
    "contexts, skips": ("context", "skip"),
    "coupling networks": ("flow.networks",),
    "actnorms, 1 × 1": ("flow.affines",),
    "endblock": ("endblock",),
}


@functools.cache
def _model(preset: str) -> HFlow:
    with torch.device("meta"):  # shapes only
        return HFlow.from_config(preset)


def test_parameter_counts():
    counts = {preset: _counts(_model(preset)) for preset in preset_names("hflow")}
    order = sorted(counts, key=lambda preset: -sum(counts[preset].values()))
    rows = [["part", *(f"`{preset}`" for preset in order)], ["---", *(["---:"] * len(order))]]
    rows += [[part, *(f"{counts[preset][part]:,}" for preset in order)] for part in PARTS]
    rows += [["all", *(f"{sum(counts[preset].values()):,}" for preset in order)]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    page = (ROOT / "docs" / "model.md").read_text()
    assert table in page, f"the table of parameters in docs/model.md should be\n{table}"


def _counts(model: HFlow) -> dict[str, int]:
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        path = re.sub(r"^levels\.\d+\.", "", name)
        part, = (part for part, prefixes in PARTS.items()
                 if path.startswith(tuple(f"{prefix}." for prefix in prefixes)))
        counts[part] += parameter.numel()
    return counts


@pytest.mark.parametrize("name", ["hierarchy", "level"])
def test_figure_is_that_of_the_preset(name):
    pytest.importorskip("matplotlib")
    path = ROOT / "scripts" / "draw_hierarchy.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sheet = getattr(script, f"draw_{name}")(_model(script.PRESET))
    drawn = (ROOT / "docs" / "images" / f"{name}.svg").read_text()
    labels = " | ".join(sheet.labels)
    assert f"<dc:description>{labels}</dc:description>" in unescape(drawn), "run scripts/draw_hierarchy.py"
