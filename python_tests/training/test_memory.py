"""Settings that trade time for memory, and change nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hflow_fast.configs import load_config
from hflow_fast.data import ImageDataset
from hflow_fast.errors import ConfigError
from hflow_fast.models import HFlow
from hflow_fast.training import RunDirectory, TrainConfig, Trainer
from hflow_fast.training.changes import check_changes
from hflow_fast.training.randomness import Use, seed_generators, seeded_generator

from .tiny import tiny_config


def train(data: Path, run: Path, steps: int = 3, **general: Any) -> tuple[list[torch.Tensor], Trainer]:
    """The losses of a tiny HFlow's first ``steps`` steps of four passes, or of its next ones."""
    config = tiny_config(SAMPLES_PER_GRAD_EVAL=8, ADDED_NOISE_STD=0.05, **general)
    config["MODEL_PARAMETERS"] = load_config("tiny-16")["MODEL_PARAMETERS"]
    torch.manual_seed(0)
    directory = RunDirectory.open(run) if run.exists() else RunDirectory.create(run, config)
    directory.make_folders()
    trainer = Trainer(HFlow.from_config(config), ImageDataset.open(data), directory, config)
    trainer.initialize()
    return [trainer.step().loss for _ in range(steps)], trainer


@pytest.mark.parametrize("general", [{"MERGE_BATCHES": 4}, {"MERGE_BATCHES": 3, "MEMORY": "recompute"}])
def test_same_steps(tmp_path: Path, dataset_16: Path, general: dict[str, Any]) -> None:
    """With the same noise; three passes in one leave one over."""
    expected, plain = train(dataset_16, tmp_path / "plain")
    losses, trainer = train(dataset_16, tmp_path / "other", **general)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    for (name, one), other in zip(trainer.model.named_parameters(), plain.model.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-3, msg=name)


def test_recomputing_is_exact_and_may_begin_at_a_resume(tmp_path: Path, dataset_16: Path) -> None:
    expected, whole = train(dataset_16, tmp_path / "whole", 4)
    losses, first = train(dataset_16, tmp_path / "parts", 2)
    first.save()
    more, second = train(dataset_16, tmp_path / "parts", 2, MEMORY="recompute")
    assert second.changes == ["GENERAL.MEMORY: store → recompute"]
    assert second.model.levels[0].flow.recompute and not first.model.levels[0].flow.recompute
    assert torch.equal(torch.stack([*losses, *more]), torch.stack(expected))
    assert all(torch.equal(one, other) for one, other in zip(second.model.parameters(), whole.model.parameters()))


def test_a_run_from_before_these_settings_goes_on() -> None:
    old = tiny_config()
    assert check_changes(old, tiny_config(MEMORY="store", MERGE_BATCHES=1), "run") == []


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="MEMORY"):
        TrainConfig.from_config(tiny_config(MEMORY="little"))
    with pytest.raises(ConfigError, match="MERGE_BATCHES"):
        TrainConfig.from_config(tiny_config(MERGE_BATCHES=0))


def test_a_generator_of_its_own_draws_the_same() -> None:
    place = (torch.device("cpu"), 2**63 - 1, Use.STEP, 5, 2)
    seed_generators(*place)
    assert torch.equal(torch.rand(100), torch.rand(100, generator=seeded_generator(*place)))
