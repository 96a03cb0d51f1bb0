"""``hflow-fast import``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hflow_fast.cli import main
from hflow_fast.compat import import_original
from hflow_fast.training import load_model

from .writer import around, call


def hflow_fast(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def imported(golden_file, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("imported") / "model.safetensors"
    result = hflow_fast("import", golden_file, out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_what_it_says(imported):
    out, said = imported
    for words in ("32 × 32 pixels, levels 32, 16, 8", "152,189 parameters", "727 tensors, the moving average",
                  "17 bytes of Python source, not run", f"{out}: written"):
        assert words in said


def test_the_file_is_a_model_for_every_command(imported, golden_file, tmp_path):
    out, _ = imported
    model, config = load_model(out)
    expected, settings = import_original(golden_file)
    assert config == settings
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    result = hflow_fast("sample", out, "--out", tmp_path / "samples", "--n", 2)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2


def test_a_state_dict_with_its_configuration(weights_file, config_file, imported, tmp_path):
    result = hflow_fast("import", weights_file, tmp_path / "out.safetensors", "--config", config_file)
    assert result.exit_code == 0, result.output
    assert "a state dict of the original" in result.output and "not run" not in result.output
    tensors, expected = (load_model(path)[0].state_dict() for path in (tmp_path / "out.safetensors", imported[0]))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_a_model_of_ours_is_not_imported_again(imported, config_file, tmp_path):
    for options in ((), ("--config", config_file)):
        result = hflow_fast("import", imported[0], tmp_path / "out.safetensors", *options)
        assert result.exit_code == 2 and "a file of hflow_fast already" in result.output


def test_the_folder_of_the_output_is_made(golden_file, tmp_path):
    result = hflow_fast("import", golden_file, tmp_path / "models" / "out.safetensors")
    assert result.exit_code == 0 and (tmp_path / "models" / "out.safetensors").is_file(), result.output


def test_settings_that_mean_nothing_here_are_listed(weights_file, config_file, tmp_path):
    config = json.loads(config_file.read_text())
    config["GENERAL"]["LOAD_CHECKPOINT"] = "/home/someone"
    config["GENERAL"]["FOO\x1b[2J"] = 1
    config["EXTRA"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = hflow_fast("import", weights_file, tmp_path / "out.safetensors", "--config", tmp_path / "config.json")
    assert r"left out   settings GENERAL.LOAD_CHECKPOINT, GENERAL.FOO\x1b[2J, EXTRA" in result.output


def test_nothing_is_replaced(golden_file, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    result = hflow_fast("import", golden_file, out)
    assert result.exit_code == 2 and "already exists" in result.output
    assert out.read_text() == "precious"


def test_a_hostile_file_is_one_line_and_leaves_nothing(tmp_path, canary):
    (tmp_path / "model.bin").write_bytes(around(call("os.system", f"touch {canary}")))
    result = hflow_fast("import", tmp_path / "model.bin", tmp_path / "out.safetensors")
    assert result.exit_code == 2
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert "refused: it names os.system" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
