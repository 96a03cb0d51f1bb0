from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from hflow_fast.data import ImageDataset
from hflow_fast.errors import ConfigError
from hflow_fast.models import HFlow
from hflow_fast.nn import ActNorm, initialize_locally
from hflow_fast.training import (
    RankError, Ranks, RunDirectory, Session, TrainConfig, Trainer, process_group, read_checkpoint,
    read_metrics,
)
from hflow_fast.training import distributed
from hflow_fast.training import session as session_module
from hflow_fast.training.checks import check_ranks
from hflow_fast.training.distributed import own_device
from hflow_fast.training.evaluation import held_out_bits_per_dim

from .processes import in_processes
from .tiny import TinyFlow, tiny_config

# Three passes in a step, so that two processes have unequal shares; two steps in an epoch; encoders frozen in the
# second.
GENERAL = {"SAMPLES_PER_GRAD_EVAL": 6, "LEARNING_RATE_CUT_ENCODERS": 1, "STEPS": 100}


def trainer_for(ranks: Ranks, data: Path, directory: Path) -> Trainer:
    """In float64, where the order of a sum does not show. All ranks but 0 begin with other weights."""
    config = tiny_config(**GENERAL)
    torch.manual_seed(ranks.rank)
    model = TinyFlow(noise=0.1).double()
    run = RunDirectory(directory)
    if ranks.is_writer and not directory.exists():
        RunDirectory.create(directory, config).make_folders()
    return Trainer(model, ImageDataset.open(data), run, config, ranks=ranks)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.model.state_dict(), **{f"average.{k}": v for k, v in trainer.average.state_dict().items()}}


def train(ranks: Ranks, data: Path, directory: Path, steps: int) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Takes steps, from the checkpoint if there is one, and saves."""
    trainer = trainer_for(ranks, data, directory)
    trainer.initialize()
    results = [trainer.step() for _ in range(steps)]
    trainer.save()
    return [(float(result.loss), float(result.gradient_norm)) for result in results], state(trainer)


def test_processes_train_as_one_and_a_run_changes_their_number(tmp_path: Path, dataset: ImageDataset) -> None:
    """1 process for 6 steps; and 2, 1 and 2 processes for 2 steps each: equal but for the order of sums."""
    expected, whole = train(Ranks(), dataset.path, tmp_path / "one", 6)
    results = []
    for count in (2, 1, 2):
        if count == 1:
            ranks = [train(Ranks(), dataset.path, tmp_path / "parts", 2)]
        else:
            ranks = in_processes(count, train, dataset.path, tmp_path / "parts", 2)
        results += ranks[0][0]
        for other in ranks[1:]:
            assert other[0] == ranks[0][0]
            assert all(torch.equal(other[1][name], value) for name, value in ranks[0][1].items())
    torch.testing.assert_close(torch.tensor(results), torch.tensor(expected), rtol=1e-6, atol=0)  # the loss is float32
    for name, value in whole.items():
        torch.testing.assert_close(ranks[0][1][name], value, rtol=1e-11, atol=1e-13)


def evaluate_and_add_up(ranks: Ranks, data: Path) -> tuple[dict[str, float], list[torch.Tensor]]:
    torch.manual_seed(0)
    images = ImageDataset.open(data).train
    values = held_out_bits_per_dim(TinyFlow(noise=0.1), images, torch.arange(len(images)), batch_size=1, ranks=ranks)
    tensors = [torch.full((3, 2), 1.0 + ranks.rank).t(), torch.tensor(1.0), torch.zeros(0), torch.ones(5).double(),
               torch.ones(4), torch.ones(2)]
    if ranks.count > 1:
        distributed._BUCKET = 24  # so that there are several; this process is not used again
    ranks.add_up(tensors)
    return values, tensors


def test_evaluation_has_the_value_of_one_process(dataset: ImageDataset) -> None:
    alone, _ = evaluate_and_add_up(Ranks(), dataset.path)
    for values, tensors in in_processes(3, evaluate_and_add_up, dataset.path):
        assert values == alone
        for tensor, value in zip(tensors, (torch.full((2, 3), 6.0), torch.tensor(3.0), torch.zeros(0),
                                           torch.full((5,), 3.0).double(), torch.full((4,), 3.0),
                                           torch.full((2,), 3.0)), strict=True):
            assert torch.equal(tensor, value)


def test_every_evaluated_batch_has_noise_of_its_own(dataset: ImageDataset) -> None:
    model = TinyFlow(noise=0.1)
    once, again, twice = (held_out_bits_per_dim(model, dataset.held_out, torch.tensor(indices), batch_size=1)
                          for indices in ([0], [0], [0, 0]))
    assert once == again
    assert once != twice


def train_a_part_in_one_process(ranks: Ranks, data: Path, directory: Path) -> list[torch.Tensor]:
    trainer = trainer_for(ranks, data, directory)
    trainer.initialize()
    if ranks.rank == 1:  # as in a model that leaves out a part, depending on the images
        trainer.model.loss = lambda x: (x - trainer.model.encoder).square().mean(dim=(1, 2, 3))
    trainer.step()
    return [parameter.detach() for parameter in trainer.model.parameters()]


def test_a_parameter_without_gradient_in_one_process(tmp_path: Path, dataset: ImageDataset) -> None:
    first, second = in_processes(2, train_a_part_in_one_process, dataset.path, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def save_after_a_difference(ranks: Ranks, data: Path, directory: Path) -> str:
    trainer = trainer_for(ranks, data, directory)
    trainer.initialize()
    trainer.save()
    trainer.step()
    if ranks.rank == 1:
        trainer.average.decoder.view(-1)[7] *= 1 + 1e-15
    try:
        trainer.save()
    except (RankError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_processes_that_differ_do_not_save(tmp_path: Path, dataset: ImageDataset) -> None:
    first, second = in_processes(2, save_after_a_difference, dataset.path, tmp_path / "run")
    assert first.startswith("RankError: process 1 and process 0 differ in the average of decoder;")
    assert second == "SystemExit: 2"
    assert read_checkpoint(tmp_path / "run", "training").training["step"] == 0


def start_with_a_step_ahead(ranks: Ranks, data: Path, directory: Path) -> str:
    trainer = trainer_for(ranks, data, directory)
    trainer.step_count += ranks.rank
    with pytest.raises((RankError, SystemExit)) as error:
        Session(trainer).run()
    return str(error.value)


def test_processes_that_differ_do_not_start(tmp_path: Path, dataset: ImageDataset) -> None:
    first, second = in_processes(2, start_with_a_step_ahead, dataset.path, tmp_path / "run")
    assert first.startswith("process 1 and process 0 differ in the step;") and second == "2"
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def die_at_the_third_step(ranks: Ranks, data: Path, directory: Path) -> str:
    trainer = trainer_for(ranks, data, directory)
    step = trainer.step

    def step_or_die():
        if trainer.step_count == 2 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    trainer.step = step_or_die
    with pytest.raises(RankError, match="another process of this run was lost"):
        Session(trainer).run()
    return "ended"


def test_when_one_process_dies_the_others_end(tmp_path: Path, dataset: ImageDataset) -> None:
    results = in_processes(3, die_at_the_third_step, dataset.path, tmp_path / "run", timeout=20)
    assert results == ["ended", -signal.SIGKILL, "ended"]


def run_until_one_gets_a_signal(ranks: Ranks, data: Path, directory: Path) -> tuple[str, int]:
    session_module._LOG_SECONDS = 0.0
    trainer = trainer_for(ranks, data, directory)
    step = trainer.step

    def step_with_signal():
        if trainer.step_count == 2 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.step = step_with_signal
    return Session(trainer).run(), trainer.step_count


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path, dataset: ImageDataset) -> None:
    run = tmp_path / "run"
    assert in_processes(2, run_until_one_gets_a_signal, dataset.path, run) == [("SIGTERM", 3)] * 2
    assert read_checkpoint(run, "training").training["step"] == 3
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record] == [1, 2, 3]
    assert len(list((run / "tb").iterdir())) == 1


def initialize_actnorms(ranks: Ranks) -> tuple[ActNorm, ActNorm]:
    joint, local = ActNorm(3), ActNorm(3)
    joint(images(ranks.rank))
    if ranks.is_writer:
        with initialize_locally():
            local(images(0))
    ranks.broadcast(local)
    return joint, local


def test_data_dependent_initialization_is_joint_or_local() -> None:
    joint, local = ActNorm(3), ActNorm(3)
    joint(torch.cat([images(0), images(1)]))
    local(images(0))
    for layers in in_processes(2, initialize_actnorms):
        for layer, expected in zip(layers, (joint, local), strict=True):
            assert layer.is_initialized
            for name, value in expected.state_dict().items():
                torch.testing.assert_close(layer.state_dict()[name], value)


def small_model() -> HFlow:
    torch.manual_seed(1)
    return HFlow.from_config("tiny-16")


def wrapped_gradients(ranks: Ranks) -> list[torch.Tensor]:
    """A step of a user's own loop with torch's wrapper."""
    model = small_model()
    with initialize_locally():
        model(images(0), False)
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(ranks.rank)
    wrapped(images(ranks.rank)).mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def images(seed: int) -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) - 0.5


def test_the_model_trains_in_distributed_data_parallel() -> None:
    """Gradients are the mean of those that one process gets from each batch."""
    model = small_model()
    model(images(0), False)
    for rank in range(2):
        torch.manual_seed(rank)
        (model(images(rank)).mean() / 2).backward()
    for gradients in in_processes(2, wrapped_gradients):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    """``hflow-fast train`` in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--",
               "hflow_fast", "train", "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_sigterm_to_torchrun_saves_and_ends(tmp_path: Path, dataset_16: Path) -> None:
    run = tmp_path / "run"
    process = torchrun("--config", "tiny-16", "--data", dataset_16, "--run", run, "--batch-size", 2, "--hours", 1)
    while not (run / "checkpoints" / "latest.safetensors").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    match = re.search(r"SIGTERM at step (\d+), saved; continue with --resume", output)
    assert match and output.count("SIGTERM") == 1, output + errors
    assert int(match[1]) == read_checkpoint(run, "training").training["step"]
    assert "2 processes share the 4 passes of a step" in output and "Traceback" not in output


def test_what_a_user_got_wrong_is_said_once(tmp_path: Path) -> None:
    process = torchrun("--config", "tiny-16", "--data", tmp_path / "nothing", "--run", tmp_path / "run")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert errors.count("no such dataset") == 1 and "DatasetError" not in errors


def _fail_in_the_first(ranks: Ranks, path: Path) -> bool:
    try:
        with ranks.together():
            if ranks.is_writer:
                raise ValueError("the reason")
    except ValueError:
        time.sleep(0.5)  # as long as it may take to tell
        path.touch()
    except SystemExit:
        return path.exists()
    return True


def test_the_others_end_after_the_one_that_tells_the_reason(tmp_path: Path) -> None:
    """torchrun kills all processes when the first ends, and with it the one that has not told the reason yet."""
    assert in_processes(2, _fail_in_the_first, tmp_path / "told") == [True, True]


def test_more_processes_than_passes() -> None:
    def check(count: int, samples: int, batch_size: int) -> None:
        general = tiny_config(SAMPLES_PER_GRAD_EVAL=samples, BATCH_SIZE=batch_size)
        check_ranks(count, TrainConfig.from_config(general).general)

    check(4, 16, 4)
    check(3, 16, 4)
    with pytest.raises(ConfigError, match=r"5 processes, but a step has 4 passes .*at most 4 processes, lower "
                                          "BATCH_SIZE to 2, or raise SAMPLES_PER_GRAD_EVAL to 20"):
        check(5, 16, 4)
    with pytest.raises(ConfigError, match="at most 4 processes, or raise SAMPLES_PER_GRAD_EVAL to 5"):
        check(5, 4, 1)


def test_a_world_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but .*start them with torchrun"), process_group("cpu"):
        pass


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda:3") == "cuda:3"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert own_device("cpu") == "cpu"
    for gpus, device in ((4, "cuda:2"), (8, "cuda:2"), (1, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        assert own_device("cuda") == own_device("cuda:2") == device
    with pytest.raises(ConfigError, match="one GPU, but 4 processes"):
        own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 processes, but 2 GPUs .*--nproc-per-node 2"):
        own_device("cuda")
