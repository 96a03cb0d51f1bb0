"""The original's checkpoints become the models that they hold."""

from __future__ import annotations

import copy

import pytest
import torch

from hflow_fast.compat import import_file, import_original, read_original
from hflow_fast.errors import CheckpointError, ConfigError
from hflow_fast.models import HFlow
from hflow_fast.training import TrainConfig

from .writer import SOURCE, as_original, checkpoint, container, dumps


def assert_same_model(model: HFlow, expected: HFlow) -> None:
    assert not model.training
    got = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.pop(name), tensor), name
    assert not got


@pytest.fixture(scope="session")
def expected(config, weights) -> HFlow:
    return HFlow.from_original(config, weights)


@torch.no_grad()
def test_the_originals_file(golden_file, golden, expected, config):
    model, settings = import_original(golden_file)
    assert_same_model(model, expected)
    for got, latent in zip(model.encode(golden["x"])[0], (golden[f"z.{index}"] for index in range(4)), strict=True):
        torch.testing.assert_close(got, latent, rtol=0, atol=1e-5 * latent.abs().max().item())
    assert settings["MODEL_PARAMETERS"] == config["MODEL_PARAMETERS"]
    assert TrainConfig.from_config(settings) == TrainConfig.from_config(config)


def test_source_text_optimizer_and_device_tags(tmp_path, write, canary, config, weights, expected):
    settings = copy.deepcopy(config)
    settings["GENERAL"] |= {"LOAD_CHECKPOINT": "/home/someone", "DATASET_PATH": "/data/faces.h5"}
    data = as_original(weights, settings, tmp_path, canary, location="cuda:0")
    assert b"cuda:0" in data
    assert data.count(b"Holds everything else") == 2  # in the file's source text and beside the pickled class
    imported = import_file(write(data))
    assert_same_model(imported.model, expected)
    assert not canary.exists()
    assert imported.original.optimizer_bytes > 2 * 4 * 150_000
    # The file's own, and most of that again beside the pickled classes.
    assert imported.original.source_bytes > 1.5 * len(SOURCE)
    assert sorted(imported.left_out) == ["GENERAL.DATASET_PATH", "GENERAL.LOAD_CHECKPOINT"]
    assert "/home/someone" not in str(imported.config)


def test_old_names(golden_file, write, weights):
    """PyTorch before 1.11 and NumPy before 2 call things differently."""
    data = golden_file.read_bytes()
    for new, old in {b"ctorch\nFloatStorage\n": b"ctorch.cuda\nFloatStorage\n",
                     b"cnumpy._core.multiarray\n": b"cnumpy.core.multiarray\n"}.items():
        assert new in data
        data = data.replace(new, old)
    got = read_original(write(data)).weights
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name]) for name in weights)


def test_tensors_that_are_views(tmp_path, write, canary):
    storage = torch.arange(24.0)
    views = {"a": storage[3:6], "part.b": storage.view(4, 6)[1:3].T, "part.c": storage[7]}
    got = read_original(write(as_original(views, None, tmp_path, canary))).weights
    assert got.keys() == views.keys()
    for name, tensor in views.items():
        assert torch.equal(got[name], tensor)
        assert got[name].untyped_storage().nbytes() == 4 * tensor.numel()


def test_a_file_without_settings(golden_file, write, config):
    data = golden_file.read_bytes()
    path = write(data[:data.rindex(b'{"GENERAL"') - 4])
    with pytest.raises(CheckpointError, match="--config"):
        import_original(path)
    assert import_original(path, config)[1]["MODEL_PARAMETERS"] == config["MODEL_PARAMETERS"]


def test_a_state_dict(weights_file, config, expected):
    assert_same_model(import_file(weights_file, config).model, expected)
    with pytest.raises(CheckpointError, match="--config"):
        import_file(weights_file)


def test_weights_of_another_configuration(golden_file, config):
    other = copy.deepcopy(config)
    other["MODEL_PARAMETERS"]["COND_OUT_C"][0] += 2
    with pytest.raises(CheckpointError, match=r"original_format.*shape \(\d+, .*does not fit"):
        import_original(golden_file, other)


def test_a_transposed_weight_is_refused(config, weights):
    name = "blocks.1.skip_to_next.w"
    assert weights[name].shape[0] != weights[name].shape[1]
    with pytest.raises(CheckpointError, match=f"{name}: shape"):
        HFlow.from_original(config, weights | {name: weights[name].transpose(0, 1)})


def test_settings_with_a_mistake_are_named(golden_file, config):
    other = copy.deepcopy(config)
    other["GENERAL"]["BATCH_SIZE"] = -1
    with pytest.raises(ConfigError, match="GENERAL.BATCH_SIZE"):
        import_original(golden_file, other)


def test_other_files_are_refused(write, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.bin: cannot be read"):
        import_original(tmp_path / "nowhere.bin")
    torch.save({"weight": torch.ones(2)}, tmp_path / "new.bin")
    with pytest.raises(CheckpointError, match="a zip.*--config"):
        import_original(tmp_path / "new.bin")
    with pytest.raises(CheckpointError, match="not a file of torch.save"):
        import_original(write(checkpoint(dumps("something else") * 3 + container(dumps({})))))
    big_endian = container(dumps({})).replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    with pytest.raises(CheckpointError, match="big-endian"):
        import_original(write(checkpoint(big_endian)))
