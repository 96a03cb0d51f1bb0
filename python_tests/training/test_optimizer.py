from __future__ import annotations

import copy
import math
from typing import Callable

import pytest
import torch

from hflow_fast.training import Adamax, TrainConfig
from hflow_fast.training.ema import update_average
from hflow_fast.training.optimizer import build_optimizer, clip_and_step, learning_rates, restore, set_epoch

from .tiny import TinyFlow, tiny_config

GENERAL = TrainConfig.from_config(tiny_config()).general
FLOW, DECODER, ENCODER = 5e-3, 2e-3, 5e-4


@pytest.mark.parametrize("epoch, decays", [
    (0, 0), (9, 0), (10, 0), (11, 0), (12, 1), (13, 1), (14, 2), (20, 5), (59, 24)])
def test_rates_decay_on_even_epochs_after_the_start(epoch: int, decays: int) -> None:
    assert learning_rates(epoch, GENERAL) == pytest.approx({
        "encoders": ENCODER * 0.92**decays, "flows": FLOW * 0.95**decays, "decoders": DECODER * 0.95**decays})


def test_rates_with_an_odd_start_and_none() -> None:
    odd = GENERAL.model_copy(update={"learning_rate_decay_start": 3})
    factors = [learning_rates(epoch, odd)["flows"] / FLOW for epoch in (3, 4, 5, 6)]
    assert factors == pytest.approx([1, 0.95, 0.95, 0.95**2])
    at_once = GENERAL.model_copy(update={"learning_rate_decay_start": 0})
    assert [learning_rates(epoch, at_once)["flows"] / FLOW for epoch in (0, 1, 2)] == pytest.approx([1, 1, .95])


def test_the_schedule_is_that_of_a_multiplicative_scheduler() -> None:
    """Each epoch's factor as in the paper: the decay on even epochs after the start, 0 from the cut on."""
    config = GENERAL
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": rate}
                                 for parameter, rate in zip(parameters, (ENCODER, FLOW, DECODER))])

    def factor(decay: float, cut: float = math.inf) -> Callable[[int], float]:
        return lambda epoch: 0.0 if epoch >= cut else decay if epoch % 2 == 0 and epoch > 10 else 1.0

    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, [factor(0.92, 60), factor(0.95), factor(0.95)])
    for epoch in range(80):
        expected = dict(zip(("encoders", "flows", "decoders"), scheduler.get_last_lr()))
        assert learning_rates(epoch, config) == pytest.approx(expected), epoch
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_no_limit_for_the_gradient(limit: float) -> None:
    model = TinyFlow()
    optimizer = build_optimizer(model.parameter_groups(), GENERAL)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e4)
    norm, skipped = clip_and_step(optimizer, torch.tensor(0.0), limit)
    assert norm > 1e4 and not skipped
    assert optimizer.state[model.decoder]["exp_avg"].flatten()[0].item() == pytest.approx(1e3)


def test_encoders_are_frozen_from_the_cut_on() -> None:
    model = TinyFlow()
    optimizer = build_optimizer(model.parameter_groups(), GENERAL)
    assert set_epoch(optimizer, 59, GENERAL)["encoders"] > 0 and model.encoder.requires_grad
    assert set_epoch(optimizer, 60, GENERAL)["encoders"] == 0 and not model.encoder.requires_grad
    before = model.encoder.clone(), model.decoder.clone()
    loss = model.loss(torch.randn(2, 3, 8, 8)).mean()
    loss.backward()
    clip_and_step(optimizer, loss, 50.0)
    assert torch.equal(model.encoder, before[0]) and not torch.equal(model.decoder, before[1])


def test_first_step_is_adam_at_each_groups_rate() -> None:
    model = TinyFlow()
    optimizer = build_optimizer(model.parameter_groups(), GENERAL)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
        parameter.grad.view(-1)[0] = -0.2
    clip_and_step(optimizer, torch.tensor(0.0), 1e9)
    for name, rate in (("encoder", ENCODER), ("log_scale", FLOW), ("decoder", DECODER)):
        moved = (getattr(model, name) - getattr(before, name)).view(-1)
        torch.testing.assert_close(moved[0], torch.tensor(rate), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(moved[1:], torch.full_like(moved[1:], -rate), rtol=1e-3, atol=1e-7)


def test_gradient_is_clipped_as_a_whole() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    optimizer = build_optimizer(dict(zip(("encoders", "flows", "decoders"), ([p] for p in parameters))), GENERAL)
    for parameter in parameters:
        parameter.grad = torch.full((4,), 10.0)
    norm, skipped = clip_and_step(optimizer, torch.tensor(0.0), 1.0)
    assert norm.item() == pytest.approx(10 * 12**0.5) and not skipped
    # Adam's first moment is 0.1 of the clipped gradient, whose entries are 1 / √12.
    assert optimizer.state[parameters[0]]["exp_avg"].tolist() == pytest.approx([0.1 / 12**0.5] * 4)


@pytest.mark.parametrize("name", ["adam", "adamax"])
@pytest.mark.parametrize("loss, gradient", [(float("nan"), 1.0), (1.0, float("inf")), (1.0, float("nan"))])
def test_a_step_that_is_not_finite_changes_nothing(loss: float, gradient: float, name: str) -> None:
    model = TinyFlow()
    config = TrainConfig.from_config(tiny_config(OPTIMIZER=name)).general
    optimizer = build_optimizer(model.parameter_groups(), config)
    for value, bad in ((1.0, 1.0), (loss, gradient), (1.0, 1.0)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.log_scale.grad[0, 0, 0] = bad
        before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
        _, skipped = clip_and_step(optimizer, torch.tensor(value), 50.0)
        same = all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
        is_bad = not (value == bad == 1.0)
        assert bool(skipped) == same == is_bad
        if is_bad:
            torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    steps = optimizer.state[model.decoder] if name == "adam" else optimizer.param_groups[2]
    assert steps["step"] == 2


@pytest.mark.parametrize("given, rates, decayed", [
    ({}, (0.1, 0.1, 0.1), (0.1, 0.1, 0.1)),
    ({"LEARNING_RATE_DECODERS": 0.2, "LEARNING_RATE_DECAY": 0.5}, (0.1, 0.1, 0.2), (0.05, 0.05, 0.1)),
    ({"LEARNING_RATE_ENCODERS": 0.3, "LEARNING_RATE_DECAY_ENCODERS": 0.5}, (0.3, 0.1, 0.1), (0.15, 0.1, 0.1)),
])
def test_rates_that_are_not_given_follow_the_flows(
    given: dict[str, float], rates: tuple[float, ...], decayed: tuple[float, ...]
) -> None:
    own = {"LEARNING_RATE": 0.1, "BATCH_SIZE": 1, "SAMPLES_PER_GRAD_EVAL": 1, "STEPS": 1} | given
    config = TrainConfig.from_config({"GENERAL": own}).general
    for epoch, expected in ((0, rates), (2, decayed)):
        roles = dict(zip(("encoders", "flows", "decoders"), expected))
        assert learning_rates(epoch, config) == pytest.approx(roles)
        assert learning_rates(epoch, config, ["flows", "others"]) == pytest.approx(
            {"flows": roles["flows"], "others": roles["flows"]})
    assert learning_rates(1000, config)["encoders"] > 0


def test_a_rate_of_zero_by_warm_up_freezes_nothing() -> None:
    model = TinyFlow()
    optimizer = build_optimizer(model.parameter_groups(), GENERAL)
    assert set(set_epoch(optimizer, 60, GENERAL, warm_up=0.0).values()) == {0.0}
    assert model.decoder.requires_grad and model.log_scale.requires_grad and not model.encoder.requires_grad
    assert set_epoch(optimizer, 0, GENERAL, warm_up=0.25)["flows"] == FLOW / 4 == float(optimizer.param_groups[1]["lr"])


@pytest.mark.parametrize("name, kind, beta2", [("adam", torch.optim.Adam, 0.999), ("adamax", Adamax, 0.98)])
def test_the_configuration_chooses_the_optimizer(name: str, kind: type, beta2: float) -> None:
    """Glow's second decay is that of an epoch's steps; what the configuration says counts for a resumed run, too."""
    model = TinyFlow()
    config = TrainConfig.from_config(tiny_config(OPTIMIZER=name)).general
    optimizer = build_optimizer(model.parameter_groups(), config, steps_per_epoch=50)
    assert type(optimizer) is kind
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, beta2)] * 3
    other = TrainConfig.from_config(tiny_config(OPTIMIZER=name, BETA2=0.5)).general
    restore(optimizer, optimizer.state_dict(), other, 50)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.5)] * 3


def test_moving_average() -> None:
    model, average = TinyFlow(), TinyFlow()
    old = average.decoder.detach().clone()
    model.initialized.fill_(True)
    update_average(average, model, 0.25)
    torch.testing.assert_close(average.decoder.detach(), 0.75 * old + 0.25 * model.decoder.detach())
    assert average.initialized
    update_average(average, model, 1.0)
    assert torch.equal(average.decoder, model.decoder)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_average_stays_where_a_step_was_skipped(weight: float) -> None:
    model, average = TinyFlow(), TinyFlow()
    if weight == 1.0:
        average.load_state_dict(model.state_dict())  # as it is in the first epoch
    before = copy.deepcopy(average.state_dict())
    update_average(average, model, weight, torch.tensor(True))
    assert all(torch.equal(before[name], value) for name, value in average.state_dict().items())
    update_average(average, model, weight, torch.tensor(False))
    expected = torch.lerp(before["decoder"], model.decoder.detach(), weight)
    torch.testing.assert_close(average.decoder.detach(), expected)
