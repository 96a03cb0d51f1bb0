"""Settings that trade time for memory, and change nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from hflow_fast._memory import SavedBytes
from hflow_fast.configs import load_config
from hflow_fast.data import ImageDataset
from hflow_fast.errors import ConfigError
from hflow_fast.models import HFlow
from hflow_fast.training import RunDirectory, TrainConfig, Trainer, passes
from hflow_fast.training.changes import check_changes
from hflow_fast.training.distributed import Ranks
from hflow_fast.training.randomness import Use, seed_generator, seed_generators

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
    place, generator = (2**63 - 1, Use.STEP, 5, 2), torch.Generator()
    seed_generators(torch.device("cpu"), *place)
    seed_generator(generator, *place)
    assert torch.equal(torch.rand(100), torch.rand(100, generator=generator))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets how much memory there seems to be."""
    return lambda count: monkeypatch.setattr(passes, "free_bytes", lambda device: count)


def pass_bytes(model: HFlow) -> int:
    """What the first pass keeps, of two images."""
    with model.prepared(), SavedBytes() as kept:
        result = model.loss(torch.rand(2, 3, 16, 16) - 0.5)
    assert result.requires_grad
    return kept.total


@pytest.mark.parametrize("room, expected", [(0.0, 1), (2.9, 2), (3.1, 3), (1e6, 4), (None, 1)])
def test_as_many_passes_are_merged_as_memory_allows(
    tmp_path: Path, dataset_16: Path, free: Callable[[int | None], None], room: float | None, expected: int
) -> None:
    """Half of what is free is room for so many passes, at 1.2 times what they keep; a step has four."""
    _, trainer = train(dataset_16, tmp_path / "kept", 0)
    free(None if room is None else int(room * 2 * 1.2 * pass_bytes(trainer.model)))
    _, trainer = train(dataset_16, tmp_path / "run", 1, MERGE_BATCHES=None)
    assert trainer.merged_passes == expected


def test_recomputed_passes_are_judged_by_their_peak(
    tmp_path: Path, dataset_16: Path, free: Callable[[int | None], None]
) -> None:
    _, trainer = train(dataset_16, tmp_path / "kept", 0, MEMORY="recompute")
    free(int(2.5 * 2 * 3 * pass_bytes(trainer.model)))
    _, trainer = train(dataset_16, tmp_path / "run", 1, MERGE_BATCHES=None, MEMORY="recompute")
    assert trainer.merged_passes == 2


def test_finding_out_disturbs_nothing_and_is_done_once(
    tmp_path: Path, dataset_16: Path, free: Callable[[int | None], None]
) -> None:
    """Also after a resume where there is less memory: rounding would be another from there on."""
    expected, whole = train(dataset_16, tmp_path / "whole", 4, MERGE_BATCHES=4)
    free(10**12)
    losses, first = train(dataset_16, tmp_path / "parts", 2, MERGE_BATCHES=None)
    first.save()
    free(0)
    more, second = train(dataset_16, tmp_path / "parts", 2, MERGE_BATCHES=None)
    assert second.changes == [] and second.merged_passes == 4
    assert torch.equal(torch.stack([*losses, *more]), torch.stack(expected))
    assert all(torch.equal(one, other) for one, other in zip(second.model.parameters(), whole.model.parameters()))


class OneOfTwo(Ranks):
    """Whose partner has the memory for two passes."""

    def gather(self, value: int) -> list[int]:
        return [value, 2]


def test_processes_merge_what_all_have_memory_for(
    tmp_path: Path, dataset_16: Path, free: Callable[[int | None], None]
) -> None:
    free(10**12)
    _, trainer = train(dataset_16, tmp_path / "run", 0, MERGE_BATCHES=None)
    trainer.ranks = OneOfTwo()
    trainer.step()
    assert trainer.merged_passes == 2


def test_a_step_of_one_pass_looks_for_no_memory(make_trainer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(passes, "free_bytes", None)
    trainer = make_trainer(tmp_path / "run", BATCH_SIZE=4, MERGE_BATCHES=None)
    trainer.step()
    assert trainer.merged_passes == 1
