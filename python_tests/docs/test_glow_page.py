"""What docs/glow.md says of the presets is what they are."""

from __future__ import annotations

from pathlib import Path

import torch

from hflow_fast.configs import load_config, preset_names
from hflow_fast.models import Glow

PAGE = Path(__file__).parents[2] / "docs" / "glow.md"


def test_table_of_presets():
    rows = [["preset", "images", "L", "K", "width", "coupling", "bits", "batch", "parameters"],
            ["---", "---", *["---:"] * 3, "---", *["---:"] * 3]]
    for name in preset_names("glow"):
        config = load_config(name)
        with torch.device("meta"):
            model = Glow.from_config(name)
        images = f"{model.resolution} × {model.resolution}"
        if model.num_classes:
            images += f", {model.num_classes} classes"
        count = sum(parameter.numel() for parameter in model.parameters())
        general, settings = config["GENERAL"], model.config
        rows.append([f"`{name}`", images, settings.levels, settings.steps, settings.width, settings.coupling,
                     general["DISCRETIZATION_BITS"], general["SAMPLES_PER_GRAD_EVAL"], f"{count:,}"])
    table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    text = PAGE.read_text()
    assert f"<!-- presets -->\n{table}\n<!-- /presets -->" in text, f"the table of presets should be\n{table}"
