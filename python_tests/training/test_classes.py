"""Class-conditional models: every pass gets the labels of its own images."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Sequence

import pytest
import torch
from torch import Tensor

from hflow_fast.data import ImageDataset
from hflow_fast.errors import ConfigError, DatasetError
from hflow_fast.training import RunDirectory, Session, Trainer, likelihood_bounds, read_checkpoint, read_metrics
from hflow_fast.training import pictures
from hflow_fast.training.distributed import Ranks

from .tiny import TinyClassFlow, TinyFlow, tiny_config

Make = Callable[..., Trainer]


@pytest.fixture
def make(labelled: ImageDataset, tmp_path: Path) -> Make:
    def make(name: str = "run", dataset: ImageDataset = labelled, classes: int = 2, ranks: Ranks | None = None,
             **general: Any) -> Trainer:
        config = tiny_config(**general)
        torch.manual_seed(0)
        run = RunDirectory(tmp_path / name)
        if not run.path.exists():
            RunDirectory.create(run.path, config).make_folders()
        return Trainer(TinyClassFlow(classes), dataset, run, config, ranks=ranks)

    return make


def watch(trainer: Trainer, method: str = "loss") -> list[tuple[Tensor, Tensor]]:
    """What the model is given from now on: images of 8 bits, and labels."""
    given, original = [], getattr(trainer.model, method)

    def watched(x: Tensor, *arguments: Any, labels: Tensor) -> Any:
        given.append((((x + 0.5) * 256).floor(), labels.clone()))
        return original(x, *arguments, labels=labels)

    setattr(trainer.model, method, watched)
    return given


def right_labels(dataset: ImageDataset, images: Tensor) -> list[int]:
    """By what the images look like."""
    known = dataset.train[:].float()
    return [int(dataset.train.labels[(known - image).abs().sum(dim=(1, 2, 3)).argmin()]) for image in images]


@pytest.mark.parametrize("merged", [1, 2])
def test_passes_get_the_labels_of_their_images(make: Make, labelled: ImageDataset, merged: int) -> None:
    trainer = make(HORIZONTAL_FLIPS=False, ADDED_NOISE_STD=0.0, MERGE_BATCHES=merged)
    given = watch(trainer)
    for _ in range(4):
        trainer.step()
    assert len(given) == 8 // merged and all(len(labels) == 2 * merged for _, labels in given)
    seen = torch.cat([labels for _, labels in given]).tolist()
    assert seen == [label for images, _ in given for label in right_labels(labelled, images)]
    assert len(set(seen)) == 2


def test_initialization_and_the_repeated_passes_get_them(make: Make, labelled: ImageDataset) -> None:
    trainer = make(HORIZONTAL_FLIPS=False, ADDED_NOISE_STD=0.0)
    given = watch(trainer, "initialize")
    trainer.initialize()
    (images, labels), = given
    assert labels.tolist() == right_labels(labelled, images) and len(labels) == 12
    given = watch(trainer)
    trainer.step()
    trainer.diagnose()
    for (images, labels), (again, labels_again) in zip(given[:2], given[2:], strict=True):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)


def test_processes_share_labels_as_they_share_images(make: Make, labelled: ImageDataset) -> None:
    class Two(Ranks):
        def add_up(self, tensors: Sequence[Tensor]) -> None:
            pass

    given = []
    for rank in range(2):
        trainer = make(str(rank), ranks=Two(rank, 2), HORIZONTAL_FLIPS=False, ADDED_NOISE_STD=0.0)
        given.append(watch(trainer))
        trainer.step()
    for (images, labels), in given:
        assert labels.tolist() == right_labels(labelled, images)
    assert not torch.equal(given[0][0][0], given[1][0][0])


def test_labels_make_a_difference_and_a_resume_is_exact(make: Make) -> None:
    whole = make("whole")
    whole.initialize()
    for _ in range(6):
        whole.step()
    assert not torch.equal(whole.model.shifts[0], whole.model.shifts[1])
    first = make("parts")
    first.initialize()
    for _ in range(4):
        first.step()
    first.save()
    second = make("parts")
    for _ in range(2):
        second.step()
    assert all(map(torch.equal, second.model.state_dict().values(), whole.model.state_dict().values()))


def test_a_session_of_a_class_conditional_model(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "draw_samples", lambda model, count, *, std, seed, bits, labels: (
        drawn.append(labels.tolist()), torch.zeros(count, 3, 8, 8, dtype=torch.uint8))[1])
    monkeypatch.setattr(pictures, "reconstruct", lambda model, x, labels: (
        drawn.append(labels.tolist()), torch.zeros(2 * len(x), 3, 8, 8, dtype=torch.uint8))[1])
    trainer = make(STEPS=3)
    assert Session(trainer).run() == "finished"
    assert drawn[0] == [0] * 8 + [1] * 8
    assert drawn[1] == trainer.dataset.held_out.labels.tolist()
    record = read_metrics(trainer.run.metrics)[-1]
    bounds = likelihood_bounds(trainer.average, trainer.dataset.held_out, torch.arange(4), batch_size=2)
    assert record["held_out_bits_per_dim"] == pytest.approx(float(bounds.total.mean()))
    assert read_checkpoint(trainer.run.path).config["GENERAL"]["CLASS_NAMES"] == ["bright", "dark"]


def test_rows_of_samples_are_ten_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr(pictures, "draw_samples", lambda model, count, *, std, seed, bits, labels: (
        drawn.append(labels), torch.zeros(count, 3, 8, 8, dtype=torch.uint8))[1])
    config = pictures.TrainConfig.from_config(tiny_config())
    assert pictures.sample_grid(TinyClassFlow(40), config).shape == (3, 10 * 98 + 2, 8 * 98 + 2)
    assert drawn[0].tolist() == [label for label in range(10) for _ in range(8)]


def test_evaluation_takes_the_labels_of_its_images(make: Make, labelled: ImageDataset, dataset: ImageDataset) -> None:
    model = make().model.eval()
    with torch.no_grad():
        model.shifts.copy_(torch.tensor([0.5, -0.5])[:, None, None, None])
    chosen = likelihood_bounds(model, labelled.held_out, torch.tensor([1, 3]), batch_size=1).total[0]
    for index, value in zip((1, 3), chosen):
        bounds = {}
        for label in range(2):
            given = copy.copy(labelled.held_out)
            given.labels = torch.full((4,), label)
            bounds[label] = likelihood_bounds(model, given, torch.tensor([1, 3]), batch_size=1).total[0][index // 2]
        assert value == bounds[int(labelled.held_out.labels[index])] and len(set(map(float, bounds.values()))) == 2
    with pytest.raises(DatasetError, match="conditional on 2 classes, but the images have none.*--labels folders"):
        likelihood_bounds(model, dataset.held_out, torch.arange(2), batch_size=2)
    with pytest.raises(DatasetError, match="conditional on 2 classes, but the images have none"):
        likelihood_bounds(model, labelled.held_out[:], torch.arange(2), batch_size=2)
    with pytest.raises(DatasetError, match="have a class 1, but the model's are 0 to 0"):
        likelihood_bounds(TinyClassFlow(1), labelled.held_out, torch.arange(2), batch_size=2)


def test_other_models_are_not_given_labels(labelled: ImageDataset, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", tiny_config())
    run.make_folders()
    trainer = Trainer(TinyFlow(), labelled, run, tiny_config())
    trainer.initialize()
    trainer.step()  # TinyFlow takes none
    trainer.save()
    assert "CLASS_NAMES" not in read_checkpoint(run.path).config["GENERAL"]


def test_datasets_whose_classes_do_not_fit(make: Make, labelled: ImageDataset, dataset: ImageDataset) -> None:
    with pytest.raises(DatasetError, match="its images have no labels, .* 2 classes.*--labels folders.*CONDITIONAL"):
        make(dataset=dataset)
    with pytest.raises(ConfigError, match="NUM_CLASSES is 3, but .* has 2 classes; make them equal"):
        make(classes=3)
    labels = labelled.manifest.labels.model_copy(update={"kind": "attributes"})
    manifest = labelled.manifest.model_copy(update={"labels": labels})
    with pytest.raises(DatasetError, match="attributes, which are no classes"):
        make(dataset=replace(labelled, manifest=manifest))
    with pytest.raises(ConfigError, match="CLASS_NAMES are 1 names, but the model has 2 classes"):
        make(CLASS_NAMES=["cat"])
    trainer = make(CLASS_NAMES=["cat", "dog"])
    trainer.save()
    assert read_checkpoint(trainer.run.path).config["GENERAL"]["CLASS_NAMES"] == ["cat", "dog"]
