"""Steps that are recorded and replayed. Without a GPU, a tape of dispatched operations stands in for CUDA graphs."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hflow_fast import _replay
from hflow_fast._replay import Replay
from hflow_fast.data import ImageDataset
from hflow_fast.errors import ConfigError
from hflow_fast.models import HFlow
from hflow_fast.models.building import build_model
from hflow_fast.nn import skew_exponential
from hflow_fast.nn._data_init import DataInitialized
from hflow_fast.nn.skew_exponential import Squarings
from hflow_fast.training import RunDirectory, Trainer
from hflow_fast.training.distributed import Ranks
from hflow_fast.training.trainer import StepResult
from hflow_fast.training.window import Window

from .recording import tape_recorder
from .tiny import tiny_config

MakeTrainer = Callable[..., Trainer]
PRESETS = pytest.mark.parametrize("preset, optimizer", [("tiny-16", "adam"), ("glow-tiny-16", "adamax")])

def state(trainer: Trainer) -> list[Tensor]:
    moments = [value for values in trainer._optimizer.state.values() for value in values.values()]
    moments += [group["step"] for group in trainer._optimizer.param_groups if "step" in group]  # Adamax's
    return [*trainer.model.state_dict().values(), *trainer.average.state_dict().values(), *moments]


def record(trainer: Trainer) -> Trainer:
    """Lets the trainer record its steps; ``trainer.recordings`` counts them."""
    trainer.recordings = 0
    new_recorder = tape_recorder(lambda: state(trainer))

    def counted() -> Any:
        trainer.recordings += 1
        return new_recorder()

    trainer._replay = Replay(counted, name="training")
    return trainer


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch) -> None:
    monkeypatch.setattr(_replay, "WARM_UP", 1)


@pytest.fixture
def train(dataset_16: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(name: str, device: str = "cpu", preset: str = "tiny-16", **general: Any) -> Trainer:
        torch.manual_seed(0)
        config = tiny_config(**general)
        return Trainer(build_model(preset).to(device), ImageDataset.open(dataset_16),
                       RunDirectory.create(tmp_path / name, config), config, device)

    return make


def assert_equal_runs(plain: Trainer, recorded: Trainer, steps: int) -> None:
    for number in range(steps):
        expected, result = plain.step(), recorded.step()
        for name in ("loss", "gradient_norm", "skipped"):
            assert torch.equal(getattr(result, name), getattr(expected, name)), (number, name)
        assert all(map(torch.equal, state(recorded), state(plain))), number


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_replays_give_the_same_numbers(  # 3 steps are an epoch
    tmp_path: Path, make_trainer: MakeTrainer, optimizer: str
) -> None:
    """To the bit: noise, data, warm-up, decays, the average's weight from epoch 1 on, frozen encoders from 3 on."""
    schedule = {"noise": 0.1, "LEARNING_RATE_DECAY_START": 0, "LEARNING_RATE_CUT_ENCODERS": 3, "OPTIMIZER": optimizer,
                "WARMUP_EPOCHS": 2.5}
    plain, recorded = make_trainer(tmp_path / "a", **schedule), record(make_trainer(tmp_path / "b", **schedule))
    plain.initialize(), recorded.initialize()
    assert_equal_runs(plain, recorded, 15)
    assert recorded.recordings == 3  # epochs 0, 1 and 3; the decay of epoch 2 needs none
    assert recorded._replay.is_recorded


@PRESETS
def test_replays_of_the_model_give_the_same_numbers(train: Callable[..., Trainer], preset: str, optimizer: str) -> None:
    settings = {"preset": preset, "OPTIMIZER": optimizer, "EMA_WEIGHT": 1.0}
    plain, recorded = train("a", **settings), record(train("b", **settings))
    plain.initialize(), recorded.initialize()
    assert_equal_runs(plain, recorded, 4)
    assert recorded.recordings == 1


@pytest.mark.parametrize("merged", [2, 3])
def test_replays_of_merged_passes_draw_new_noise(train: Callable[..., Trainer], merged: int) -> None:
    """From generators that are seeded between the legs; three passes in one leave one over."""
    settings = {"EMA_WEIGHT": 1.0, "SAMPLES_PER_GRAD_EVAL": 8, "MERGE_BATCHES": merged, "ADDED_NOISE_STD": 0.05}
    plain, recorded = train("a", **settings), record(train("b", **settings))
    plain.initialize(), recorded.initialize()
    assert_equal_runs(plain, recorded, 4)
    assert recorded.recordings == 1 and recorded._replay.is_recorded


@PRESETS
def test_a_replay_counts_as_a_change_of_what_it_changes(
    train: Callable[..., Trainer], preset: str, optimizer: str
) -> None:
    """The average keeps what it has computed from its weights, until their version changes."""
    trainer = record(train("run", preset=preset, OPTIMIZER=optimizer))
    trainer.initialize()
    x = torch.rand(2, 3, 16, 16) - 0.5
    for _ in range(3):
        trainer.step()
        with torch.no_grad():
            log_det = trainer.average.encode(x)[1]
        fresh = trainer.average.encode(x)[1].detach()  # with gradients on, nothing is kept
        torch.testing.assert_close(log_det, fresh, rtol=1e-5, atol=1e-4)
    assert trainer._replay.is_recorded


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_a_replay_skips_a_step_that_is_not_finite(tmp_path: Path, make_trainer: MakeTrainer, optimizer: str) -> None:
    trainer = record(make_trainer(tmp_path / "run", EMA_WEIGHT=1.0, OPTIMIZER=optimizer))
    trainer.initialize()
    for _ in range(3):
        trainer.step()
    before = [value.clone() for value in state(trainer)]
    with torch.no_grad():
        trainer.model.decoder[0, 0, 0] = before[2][0, 0, 0] = torch.inf
    names = list(trainer.model.state_dict())
    assert names[2] == "decoder"
    assert trainer.step().skipped and trainer._replay.is_recorded
    after = state(trainer)[:len(names)]
    assert all(map(torch.equal, after, before))


class TwoRanks(Ranks):
    """Rank 0 of two, the other of which always has the same gradients."""

    def __init__(self) -> None:
        super().__init__(rank=0, count=2)
        self.exchanges: list[int] = []

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        self.exchanges.append(len(tensors))
        torch._foreach_mul_(tensors, 2.0)


def test_ranks_exchange_gradients_between_replays(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainers = [make_trainer(tmp_path / name, noise=0.1, EMA_WEIGHT=1.0) for name in "ab"]
    for trainer in trainers:
        trainer.ranks = TwoRanks()
        trainer._loader._share = trainer.ranks.share
    plain, recorded = trainers[0], record(trainers[1])
    assert_equal_runs(plain, recorded, 4)
    assert recorded.recordings == 1
    assert plain.ranks.exchanges == recorded.ranks.exchanges == [4] * 4  # the loss and three gradients


def test_results_of_a_step_are_not_those_of_the_next(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = record(make_trainer(tmp_path / "run"))
    results = [trainer.step() for _ in range(4)]
    assert len({float(result.loss) for result in results}) == 4


def test_other_shapes_and_parameters_are_recorded_anew() -> None:
    kept = torch.zeros(3)
    replay = Replay(tape_recorder(lambda: [kept]), name="test")

    def work(inputs):
        yield lambda: None
        kept[:1] += inputs[0].sum()
        return kept * 2

    def run(size: int, key: int) -> bool:
        expected = float(kept[0]) + size
        assert float(replay.run(work, [torch.ones(size)], key)[0]) == 2 * expected
        return replay.is_recorded

    assert [run(*call) for call in [(2, 0), (2, 0), (2, 0), (3, 0), (3, 0), (3, 1), (3, 1)]] == [
        False, True, True, False, True, False, True]


def failing_recorder() -> Callable[[], Any]:
    @contextmanager
    def recorder() -> Iterator[None]:
        try:
            yield None
        except ValueError:
            raise RuntimeError("capture failed") from None

    return lambda: recorder


def test_what_cannot_be_recorded_is_done_as_it_stands(tmp_path, make_trainer, caplog, monkeypatch) -> None:
    plain, trainer = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b")
    trainer._replay = Replay(failing_recorder(), name="training")
    loss = trainer.model.loss
    plain.step(), trainer.step()
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        count = iter(range(9))
        broken.setattr(trainer.model, "loss", lambda x: loss(x) if next(count) else _raise())
        trainer.step()
        trainer.step()
    plain.step(), plain.step()
    assert all(map(torch.equal, state(trainer), state(plain)))
    assert [record.message for record in caplog.records] == [
        "training: no CUDA graph, so each launch costs the host its time: ValueError: reads a value"]


def _raise() -> None:
    raise ValueError("reads a value")


def test_recording_can_be_required(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    with pytest.raises(ConfigError, match="CUDA_GRAPH is on, but the device is cpu"):
        make_trainer(tmp_path / "run", CUDA_GRAPH="on")
    replay = Replay(failing_recorder(), name="test", required=True)

    def work(inputs):
        yield lambda: None
        if next(count):
            raise ValueError

    count = iter(range(3))
    replay.run(work, [], None)
    with pytest.raises(RuntimeError, match="capture failed"):
        replay.run(work, [], None)


class Watch(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values read by the host, shapes that depend on them, copies from it."""

    HOST = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim",
            "unique_consecutive", "lift_fresh", "bincount", "repeat_interleave", "_linalg_check_errors"}
    WITH_HOST_SCALARS = {"add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "clamp"}

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.HOST, f"{function} waits for the device"
        self.count += 1
        result = function(*args, **(kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, Tensor)]
        # Operations on elements take a number of the host as an argument of the kernel; others copy it.
        may = name.rstrip("_") in self.WITH_HOST_SCALARS
        for tensor in [*given, *(value for value in tree_leaves(result) if isinstance(value, Tensor))]:
            is_number = may and tensor.dim() == 0
            assert is_number or tensor.device.type == self.device, f"{function} has a tensor of the host"
        return result


def fused_adam(*tensors: list[Tensor], lr: Tensor, found_inf: Tensor, grad_scale: None, **settings: float) -> None:
    """Stands in for PyTorch's, which has none for the meta device."""
    assert {tensor.device.type for tensor in [*tree_leaves(tensors), lr, found_inf]} == {"meta"}


@PRESETS
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_step_reads_nothing_and_copies_nothing_from_the_host(
    device: str, train: Callable[..., Trainer], preset: str, optimizer: str, monkeypatch
) -> None:
    """The meta device finds what comes from a processor and cannot be read; the processor, tensors made of numbers."""
    monkeypatch.setattr(Squarings, "choose", lambda self, bound, dtype: 3)
    if device == "meta":  # unknown to these
        monkeypatch.setattr(torch, "autocast", lambda *arguments, **settings: nullcontext())
        monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda parameter: None)
        monkeypatch.setattr(torch, "_fused_adam_", fused_adam)
    trainer = train("run", device, preset, BATCH_SIZE=4, OPTIMIZER=optimizer)
    for module in [*trainer.model.modules(), *trainer.average.modules()]:
        if isinstance(module, DataInitialized):
            module._known_initialized = True
    window = Window(trainer.device)
    window.add(trainer.step())  # the optimizer makes its state, constants are made once
    images = next(trainer._loader)
    with Watch(device) as watch:
        loss, norm, skipped = _replay._do(trainer._work(images, 0.005))
        window.add(StepResult(loss, norm, skipped, 0.0))
    assert watch.count > (1000 if preset == "tiny-16" else 200)


def test_encoding_and_decoding_read_nothing(train: Callable[..., Trainer]) -> None:
    """Where the weights are the same as last time."""
    model = HFlow.from_config("tiny-16").eval()
    x = torch.rand(2, 3, 16, 16) - 0.5
    with torch.no_grad():
        latents, _ = model.encode(x)
        model.decode(latents)
        with Watch("cpu"):
            latents, _ = model.encode(x)
            model.decode(latents)


def test_a_captured_exponential_is_followed(monkeypatch) -> None:
    """In a graph the number of squarings is fixed; the norms that its replays leave behind are watched."""

    class Event:
        def query(self) -> bool:
            return True

    monkeypatch.setattr(skew_exponential, "_send", lambda bound: (bound.clone(), Event()))
    squarings, bound = Squarings(), torch.tensor(10.0, dtype=torch.float64)
    number = squarings.choose(bound, torch.float32)
    assert squarings.follow() == number  # nothing is captured
    squarings._captured = bound, torch.float32
    assert squarings.follow() == number
    bound.fill_(40.0)
    squarings.follow()
    assert squarings.follow() == number + 2
    bound.fill_(1.0)
    squarings.follow()
    assert squarings.follow() == number + 2
