from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hflow_fast._files import replacing
from hflow_fast.configs import load_config
from hflow_fast.errors import CheckpointError
from hflow_fast.models import HFlow
from hflow_fast.training import read_checkpoint, save_checkpoint
from hflow_fast.training.checkpoint import load_initial_weights, load_model, load_weights

from .tiny import TinyFlow, tiny_config


def test_round_trip(tmp_path: Path) -> None:
    model, average = TinyFlow(), TinyFlow()
    training = {"step": 3, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.999)}}
    save_checkpoint(tmp_path / "a", tiny_config(), model, average, training)
    checkpoint = read_checkpoint(tmp_path / "a", "model", "average", "training")
    assert checkpoint.config == tiny_config()
    for module, weights in ((model, checkpoint.model), (average, checkpoint.average)):
        torch.testing.assert_close(weights, dict(module.state_dict()), rtol=0, atol=0)
    assert checkpoint.training == training
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_the_wanted_parts_are_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", tiny_config(), TinyFlow(), TinyFlow(), {"step": 0})
    checkpoint = read_checkpoint(tmp_path / "a", "average")
    assert checkpoint.model is None and checkpoint.training is None and checkpoint.average is not None


def test_tied_and_permuted_weights_are_saved(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.randn(3, 4).t())
    module.b = module.a
    save_checkpoint(tmp_path / "a", tiny_config(), module)
    weights = read_checkpoint(tmp_path / "a", "model").model
    assert torch.equal(weights["a"], module.a) and torch.equal(weights["b"], module.a)


def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, tiny_config(), TinyFlow())
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(before[:100])
        raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a"]


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """A real failure of write(2), as on a full disk: the process may not write files of more than 4 kB."""
    path = tmp_path / "a"
    save_checkpoint(path, tiny_config(), TinyFlow())
    before = path.read_bytes()
    script = f"""
import resource
import torch
from hflow_fast._files import replacing
from hflow_fast.configs import load_config
from hflow_fast.errors import CheckpointError
from hflow_fast.models import HFlow
from hflow_fast.training import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_checkpoint({str(path)!r}, {{}}, torch.nn.Linear(100, 100))
except CheckpointError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(path) in result.stdout and "not saved" in result.stdout
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:4], lambda data: b"",
                                    lambda data: b"\xff" * len(data)])
def test_damaged_files_are_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, tiny_config(), TinyFlow())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="a: damaged"):
        read_checkpoint(path, "model")


@pytest.mark.parametrize("part", ["model", "average", "training"])
def test_a_single_wrong_bit_is_noticed(tmp_path: Path, part: str) -> None:
    """safetensors itself notices missing bytes only."""
    path = tmp_path / "a"
    save_checkpoint(path, tiny_config(), TinyFlow(), TinyFlow(), {"step": 3})
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    name = next(name for name in sorted(tensors) if name.startswith(part) and tensors[name].numel() > 1)
    tensors[name].reshape(-1).view(torch.uint8)[5] ^= 1
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=f"a: damaged .the checksum of its part {part} is wrong"):
        read_checkpoint(path, part)
    read_checkpoint(path, *({"model", "average", "training"} - {part}))


@pytest.mark.parametrize("change", [{"config": None}, {"version": None}, {"version": "q"}, {"notes": "{"}])
def test_a_damaged_header_sends_a_run_back_to_the_checkpoint_before(tmp_path: Path, change, caplog) -> None:
    """safetensors parses the header but has no checksum of it."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    latest = folder / "latest.safetensors"
    for path, step in ((folder / "step_00000002.safetensors", 2), (latest, 3)):
        save_checkpoint(path, tiny_config(), TinyFlow(), notes={"step": step})
    with safe_open(latest, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() | change
    save_file(tensors, latest, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(CheckpointError, match="latest.safetensors: damaged"):
        read_checkpoint(latest, "model")
    assert read_checkpoint(tmp_path, "model").notes["step"] == 2
    assert "Going back to the checkpoint before it" in caplog.text


def test_versions(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, tiny_config(), TinyFlow())
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    first = {key: metadata[key] for key in ("format", "config")} | {"version": "1"}  # as 0.1.0 began
    save_file(tensors, path, first)
    assert read_checkpoint(path, "model").notes == {}
    save_file(tensors, path, first | {"version": "2"})
    with pytest.raises(CheckpointError, match="format version 2, made by a newer hflow_fast.*versions up to 1; update"):
        read_checkpoint(path, "model")


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors: not a checkpoint"):
        read_checkpoint(tmp_path / "other.safetensors", "model")
    for missing in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="no such file"):
            read_checkpoint(missing, "model")


def test_training_state_is_data_only(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    save_checkpoint(tmp_path / "a", tiny_config(), TinyFlow(), training={"step": Evil()})
    with pytest.raises(CheckpointError, match="damaged or not plain data"):
        read_checkpoint(tmp_path / "a", "training")


def test_weights_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit.*weight"):
        load_weights(TinyFlow(), {"weight": torch.zeros(1)}, tmp_path / "a")


def test_the_averaged_weights_are_the_model(tmp_path: Path) -> None:
    model, average = HFlow.from_config("tiny-16"), HFlow.from_config("tiny-16")
    save_checkpoint(tmp_path / "both", load_config("tiny-16"), model, average)
    save_checkpoint(tmp_path / "one", load_config("tiny-16"), model)
    fresh = HFlow.from_config("tiny-16")
    load_initial_weights(fresh, tmp_path / "both")
    for loaded, expected in (
        (load_model(tmp_path / "both")[0], average),
        (load_model(tmp_path / "both", average=False)[0], model),
        (load_model(tmp_path / "one")[0], model),
        (fresh, average),
    ):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
