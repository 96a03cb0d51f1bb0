"""Glow's Adamax beside its formula in float64, and what a trainer needs of it."""

from __future__ import annotations

import copy
import io
import math
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hflow_fast.training import Adamax

SHAPES = [(3,), (2, 4), (), (1, 2, 3)]
ON_THE_HOST = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
VIEWS = {"aten::view.dtype", "aten::detach"}  # which launch nothing


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def gradients(step: int) -> Iterator[Tensor]:
    """Some of which are smaller than what is left of earlier ones, and some 0."""
    generator = torch.Generator().manual_seed(step)
    for shape in SHAPES:
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (-step % 3)
        yield torch.where(gradient.abs() < 0.1, 0.0, gradient)


def give(optimizer: Adamax, step: int) -> None:
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients(step)):
        parameter.grad = gradient.to(parameter.dtype)


def gradients_of(optimizer: Adamax) -> list[Tensor]:
    return [parameter.grad for parameter in optimizer.param_groups[0]["params"]]


def state(optimizer: Adamax) -> list[Tensor]:
    group = optimizer.param_groups[0]
    moments = [value for values in optimizer.state.values() for value in values.values()]
    return [group["step"], *(parameter.detach() for parameter in group["params"]), *moments]


def formula(steps: int, lr: Callable[[int], float], betas: tuple[float, float], eps: float) -> list[np.ndarray]:
    weights = [parameter.detach().numpy().copy() for parameter in parameters()]
    means, largest = [np.zeros(shape) for shape in SHAPES], [np.zeros(shape) for shape in SHAPES]
    for t in range(1, steps + 1):
        rate = lr(t) * math.sqrt(1 - betas[1]**t) / (1 - betas[0]**t)
        for i, gradient in enumerate(gradients(t)):
            means[i] = betas[0] * means[i] + (1 - betas[0]) * gradient.numpy()
            largest[i] = np.maximum(betas[1] * largest[i], np.abs(gradient.numpy()))
            weights[i] = weights[i] - rate * means[i] / (largest[i] + eps)
    return weights


@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-8), ((0.5, 0.6), 0.1), ((0.0, 0.0), 1e-3)])
def test_steps_are_those_of_the_formula(betas: tuple[float, float], eps: float) -> None:
    """With a rate that changes, as a number and as a tensor that keeps its place."""
    def lr(t: int) -> float:
        return 0.3 / t

    for rate in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        optimizer = Adamax(parameters(), rate, betas, eps)
        for t in range(1, 13):
            if isinstance(rate, Tensor):
                optimizer.param_groups[0]["lr"].fill_(lr(t))
            else:
                optimizer.param_groups[0]["lr"] = lr(t)
            give(optimizer, t)
            optimizer.step()
        for parameter, expected in zip(optimizer.param_groups[0]["params"], formula(12, lr, betas, eps)):
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_it_is_pytorchs_adamax_but_for_the_correction() -> None:
    ours, theirs = Adamax(parameters(), 0.1, eps=1e-30), torch.optim.Adamax(parameters(), 0.1, eps=1e-30)
    for t in range(1, 9):
        theirs.param_groups[0]["lr"] = 0.1 * math.sqrt(1 - 0.999**t)
        for optimizer in (ours, theirs):
            give(optimizer, t)
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad += 1e-3 * (parameter.grad == 0)  # where the two add ε at different places
            optimizer.step()
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("skipped", [1, 2, 4])
def test_a_skipped_step_changes_nothing_to_the_bit(dtype: torch.dtype, skipped: int) -> None:
    """And the run goes on as if it had not been there; the very first one may be it."""
    runs = []
    for with_it in (True, False):
        optimizer = Adamax(parameters(dtype), 0.1, (0.9, 0.7))
        for t in range(1, 6):
            if with_it and t == skipped:
                before = [value.clone() for value in state(optimizer)]
                give(optimizer, 99)
                for gradient, bad in zip(gradients_of(optimizer), (math.nan, math.inf, -math.inf, math.nan)):
                    gradient.view(-1)[0] = bad
                optimizer.found_inf = torch.tensor(1.0)
                optimizer.step()
                assert all(torch.equal(*pair) for pair in zip(before, state(optimizer)))
            optimizer.found_inf = torch.tensor(0.0) if t % 2 else None
            give(optimizer, t)
            optimizer.step()
        runs.append(state(optimizer))
    assert runs[0][0] == 5
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Watched(TorchDispatchMode):
    """Refuses what would wait for a device, and counts what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.name().split(".")[0] not in ON_THE_HOST, function
        self.launched += function.name() not in VIEWS
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_value_and_is_few_launches() -> None:
    launched = []
    for count in (1, 40):
        weights = [nn.Parameter(torch.randn(4)) for _ in range(count)]
        optimizer = Adamax(weights, torch.tensor(0.1, dtype=torch.float64))
        optimizer.found_inf = torch.tensor(0.0)
        for _ in range(2):  # the first one makes the moments
            for weight in weights:
                weight.grad = torch.randn(4)
            with Watched() as watched:
                optimizer.step()
        launched.append(watched.launched)
    assert launched[0] == launched[1] < 40


def test_a_saved_state_goes_on_exactly() -> None:
    whole, parts = Adamax(parameters(), 0.1), Adamax(parameters(), 0.1)
    for t in range(1, 4):
        for optimizer in (whole, parts):
            give(optimizer, t)
            optimizer.step()
    buffer = io.BytesIO()
    torch.save(parts.state_dict(), buffer)
    weights = copy.deepcopy(parts.param_groups[0]["params"])
    resumed = Adamax(weights, 9.0, (0.1, 0.1))
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    give(whole, 4), give(resumed, 4)
    whole.step(), resumed.step()
    assert resumed.param_groups[0]["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))


def test_parameters_without_gradients_and_of_several_dtypes() -> None:
    weights = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float32)]
    optimizer = Adamax([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.5}, {"params": []}], 0.25, (0.9, 0.0))
    assert optimizer.step() is None and optimizer.param_groups[0]["step"] == 0
    for weight in weights[1:]:
        weight.grad = torch.full_like(weight, -3.0)
    assert optimizer.step(lambda: weights[1].sum()) == 2.0
    assert weights[0].tolist() == [1.0, 1.0]
    assert weights[1].tolist() == pytest.approx([1.25] * 2) and weights[2].tolist() == pytest.approx([1.5] * 2)
    assert [float(group["step"]) for group in optimizer.param_groups] == [1, 1, 0]


@pytest.mark.parametrize("settings, message", [
    ({"lr": -1.0}, "lr must be at least 0, got -1.0"), ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
    ({"eps": 0.0}, "eps must be positive, got 0.0")])
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Adamax: {message}"):
        Adamax(parameters(), **settings)
