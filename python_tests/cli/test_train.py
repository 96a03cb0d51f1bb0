from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result

from hflow_fast.configs import load_config
from hflow_fast.training import read_checkpoint

from .conftest import hflow_fast


def assert_one_line_error(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), result.output
    assert "Traceback" not in result.output


def saved_step(run: Path) -> int:
    return read_checkpoint(run, "training").training["step"]


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of ``run``, which has checkpoints of steps 0 and 2."""
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_and_its_continuation(data: Path, copy: Path) -> None:
    assert saved_step(copy) == 2
    again = hflow_fast("train", "--run", copy, "--resume")
    assert again.exit_code == 0 and "already trained to step 2" in again.output
    further = hflow_fast("train", "--run", copy, "--resume", "--steps", 3)
    assert further.exit_code == 0 and "finished at step 3" in further.output
    assert saved_step(copy) == 3
    general = json.loads((copy / "config.json").read_text())["GENERAL"]
    assert general["STEPS"] == 3 and general["EPOCHS"] is None and general["DATASET_PATH"] == str(data)


def test_cuda_graphs_want_a_gpu(data: Path, copy: Path, tmp_path: Path) -> None:
    start = ("train", "--config", "tiny-16", "--data", data, "--steps", 1, "--device", "cpu")
    assert_one_line_error(hflow_fast(*start, "--run", tmp_path / "new", "--cuda-graph"), "CUDA_GRAPH", "cpu")
    assert not (tmp_path / "new").exists()
    assert hflow_fast("train", "--run", copy, "--resume", "--steps", 3, "--no-cuda-graph").exit_code == 0
    assert json.loads((copy / "config.json").read_text())["GENERAL"]["CUDA_GRAPH"] == "off"


def test_freed_memory_is_kept_unless_memory_is_scarce(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(sys.modules["hflow_fast.cli.train"], "keep_freed_memory", kept.append)
    for memory in ("store", "recompute"):
        assert hflow_fast("train", "--run", copy, "--resume", "--memory", memory).exit_code == 0
    assert kept == [True, False]


def test_runs_without_a_name_are_numbered(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        result = hflow_fast("train", "--config", "tiny-16", "--data", data, "--steps", 1)
        assert result.exit_code == 0, result.output
        assert f"runs/tiny-16-{number}: training tiny-16" in result.output
        assert saved_step(Path("runs") / f"tiny-16-{number}") == 1
    assert_one_line_error(hflow_fast("train", "--resume"), "--run")


def test_a_new_run_starts_from_the_averaged_weights_of_another(data: Path, run: Path, tmp_path: Path) -> None:
    start = ("train", "--config", "tiny-16", "--data", data, "--steps", 1, "--init-from")
    result = hflow_fast(*start, run, "--run", tmp_path / "tuned")
    assert result.exit_code == 0, result.output
    expected = read_checkpoint(run, "average").average
    first = read_checkpoint(tmp_path / "tuned" / "checkpoints" / "step_00000000.safetensors", "model", "average")
    for weights in (first.model, first.average):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)

    tuned = ("train", "--run", tmp_path / "tuned", "--resume", "--steps", 2)
    assert_one_line_error(hflow_fast(*tuned, "--init-from", tmp_path / "other"), "LOAD_CHECKPOINT", "training has begun")
    assert hflow_fast(*tuned, "--config", "tiny-16").exit_code == 0  # a preset, which does not name it, changes nothing
    assert_one_line_error(hflow_fast(*start, tmp_path / "nowhere", "--run", tmp_path / "new"), "nowhere")
    assert not (tmp_path / "new").exists()


def test_weights_of_another_architecture_are_refused(data: Path, run: Path, tmp_path: Path) -> None:
    config = load_config("tiny-16")
    config["MODEL_PARAMETERS"]["NUM_LAYERS"][0] += 2
    (tmp_path / "deeper.json").write_text(json.dumps(config))
    result = hflow_fast("train", "--config", tmp_path / "deeper.json", "--data", data, "--run", tmp_path / "new",
                        "--init-from", run)
    assert_one_line_error(result, "MODEL_PARAMETERS")
    assert not (tmp_path / "new").exists()


def test_an_existing_run_is_not_touched(data: Path, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = hflow_fast("train", "--config", "tiny-16", "--data", data, "--run", run, "--steps", 1)
    assert_one_line_error(result, str(run), "already exists", "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_nothing_is_made_when_something_is_wrong(data: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    start = ("train", "--run", new)
    wrong = tmp_path / "wrong.json"
    config = load_config("tiny-16")
    config["GENERAL"]["BATCH_SIZ"] = 4
    wrong.write_text(json.dumps(config))
    config = load_config("tiny-16")
    config["GENERAL"]["INCEPTION_NET_PATH"] = str(tmp_path / "inception.pt")
    fid = tmp_path / "fid.json"
    fid.write_text(json.dumps(config))
    torn = tmp_path / "torn.json"
    torn.write_text('{"GENERAL": ')
    for arguments, words in (
        ((), ["--config"]),
        (("--config", "tiny-16"), ["--data"]),
        (("--config", "nothing", "--data", data), ["nothing", "presets"]),
        (("--config", torn, "--data", data), ["torn.json", "JSON"]),
        (("--config", wrong, "--data", data), ["GENERAL.BATCH_SIZ", "unknown key"]),
        (("--config", "tiny-16", "--data", tmp_path / "no"), [str(tmp_path / "no"), "no such dataset"]),
        (("--config", fid, "--data", data), [str(tmp_path / "inception.pt"), "cannot be read"]),
        (("--config", "demo", "--data", data), ["16 px", "32 px", "--resolution 32"]),
        (("--config", "tiny-16", "--data", data, "--batch-size", 64), ["too few", "(64)"]),
        (("--config", "tiny-16", "--data", data, "--steps", 0), ["--steps"]),
        (("--config", "tiny-16", "--data", data, "--device", "tpu9"), ["--device", "tpu9"]),
        (("--resume",), [str(new), "no run to resume"]),
        (("--resume", "--config", "tiny-16"), [str(new), "no run to resume"]),
    ):
        assert_one_line_error(hflow_fast(*start, *arguments), *words)
        assert not new.exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy / "checkpoints"
    latest = folder / "latest.safetensors"
    for path in (latest, folder / "step_00000002.safetensors"):  # a copy has no hard links
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1  # one bit in the middle of a tensor
        path.write_bytes(damaged)
    result = hflow_fast("train", "--run", copy, "--resume", "--steps", 3)
    assert result.exit_code == 0 and "training goes on at step 0" in result.output, result.output
    assert f"{latest}: damaged" in caplog.text
    assert saved_step(copy) == 3
    assert "from step_00000000.safetensors" in (copy / "log.txt").read_text()


def test_damaged_checkpoints_are_named_and_kept(copy: Path) -> None:
    files = list((copy / "checkpoints").iterdir())
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    assert_one_line_error(hflow_fast("train", "--run", copy, "--resume", "--steps", 3), str(copy), "damaged")
    assert all(path.stat().st_size == 1000 for path in files)


def test_a_checkpoint_that_is_not_the_latest_can_be_used(run: Path, tmp_path: Path) -> None:
    best = run / "checkpoints" / "best.safetensors"
    result = hflow_fast("sample", best, "--out", tmp_path / "out", "--n", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output


def test_a_changed_configuration_takes_effect_and_is_told(data: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["GENERAL"] |= {"LEARNING_RATE": 0.001, "STEPS": 3}
    (copy / "config.json").write_text(json.dumps(config))
    result = hflow_fast("train", "--run", copy, "--resume")
    assert result.exit_code == 0, result.output
    changes = ["configuration changed: GENERAL.LEARNING_RATE: 0.005 → 0.001",
               "configuration changed: GENERAL.STEPS: 2 → 3"]
    assert all(change in result.output and change in (copy / "log.txt").read_text() for change in changes)
    assert json.loads((copy / "metrics.jsonl").read_text().splitlines()[-2])["learning_rate/flows"] == 0.001


def test_another_configuration_file_takes_the_place_of_the_runs(data: Path, copy: Path, tmp_path: Path) -> None:
    config = load_config("tiny-16")
    config["GENERAL"] |= {"BATCH_SIZE": 2, "SAMPLES_PER_GRAD_EVAL": 8, "STEPS": 3, "EPOCHS": None}
    (tmp_path / "new.json").write_text(json.dumps(config))
    result = hflow_fast("train", "--run", copy, "--resume", "--config", tmp_path / "new.json")
    assert result.exit_code == 0 and "GENERAL.BATCH_SIZE: 4 → 2" in result.output, result.output
    assert saved_step(copy) == 3
    kept = json.loads((copy / "config.json").read_text())["GENERAL"]
    assert kept["BATCH_SIZE"] == 2 and kept["DATASET_PATH"] == str(data)


def test_another_number_of_processes_than_the_configuration_names(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["GENERAL"]["NUM_GPUS"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    result = hflow_fast("train", "--run", copy, "--resume", "--steps", 3)
    assert result.exit_code == 0
    assert "NUM_GPUS is 2, but the processes are 1" in result.output and "torchrun --nproc-per-node 2 -m -- " in result.output


def test_what_cannot_change_is_refused_by_name(copy: Path, tmp_path: Path) -> None:
    before = (copy / "config.json").read_text()
    config = json.loads(before)
    config["GENERAL"]["DISCRETIZATION_BITS"] = 5
    config["MODEL_PARAMETERS"]["LOSS_WEIGHTS"] = [1.0, 2.0]
    (tmp_path / "new.json").write_text(json.dumps(config))
    result = hflow_fast("train", "--run", copy, "--resume", "--config", tmp_path / "new.json", "--seed", 3)
    assert_one_line_error(result, "GENERAL.SEED: 0 → 3", "GENERAL.DISCRETIZATION_BITS: 8 → 5",
                          "MODEL_PARAMETERS.LOSS_WEIGHTS", "start a new run")
    assert (copy / "config.json").read_text() == before and saved_step(copy) == 2


def test_two_processes_cannot_train_in_one_run(run: Path) -> None:
    from hflow_fast.training import RunDirectory

    with RunDirectory.open(run).lock():
        assert_one_line_error(hflow_fast("train", "--run", run, "--resume", "--steps", 9), "another process")
    assert saved_step(run) == 2


def test_ctrl_c_saves_and_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "hflow_fast", "train", "--config", "tiny-16", "--data", str(data),
               "--run", str(run), "--batch-size", "4", "--hours", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (run / "checkpoints" / "latest.safetensors").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    match = re.search(r"SIGINT at step (\d+), saved; continue with --resume", output)
    assert match and int(match[1]) == saved_step(run)


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("sample", "--help")])
def test_help(arguments: tuple[str, ...]) -> None:
    result = hflow_fast(*arguments)
    assert result.exit_code == 0 and "Usage:" in result.output


def test_info_lists_versions_and_presets() -> None:
    result = hflow_fast("info")
    assert result.exit_code == 0, result.output
    assert "PyTorch" in result.output and "kernels" in result.output
    assert re.search(r"A-128 +128 × 128 pixels, 73,775,436 parameters", result.output)
    assert re.search(r"A-256 +256 × 256 pixels, 77,381,708 parameters", result.output)
