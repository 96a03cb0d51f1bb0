from __future__ import annotations

from typing import Iterator

import pytest
import torch
from torch import Tensor, nn

from hflow_fast.models import HFlow
from hflow_fast.training.diagnosis import diagnose


class Broken(nn.Module):
    """The identity with one infinite value in its output, or in the gradient of its input."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        if self.where == "output":
            y[0, 0] = torch.inf
        if self.where == "gradient":
            y = y + (x - x.detach()).abs().sqrt()  # 0, with an infinite slope
        return torch.zeros(len(x)), y


class Model(nn.Module):
    def __init__(self, where: str = "nowhere") -> None:
        super().__init__()
        self.first, self.broken, self.last = nn.Linear(3, 3), Broken(where), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.broken(self.first(x))[1])


def passes(model: nn.Module, count: int = 2, factor: float = 1.0) -> Iterator[Tensor]:
    for _ in range(count):
        yield model(torch.randn(4, 3)).square().mean() * factor


def test_the_layer_whose_output_is_not_finite_is_named() -> None:
    model = Model("output")
    assert diagnose(model, passes(model)) == (
        "The first tensor that is not finite is the output 1 of broken (Broken): 1 of its 12 values are NaN or "
        "infinite, its inputs are finite.")


def test_the_gradient_that_is_not_finite_is_named() -> None:
    model = Model("gradient")
    text = diagnose(model, passes(model))
    assert "the first gradient that is not is that of the output of first (Linear): " in text
    assert "It reaches 2 weights: first.weight, first.bias." in text
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_that_are_not_finite_are_named() -> None:
    model = Model()
    with torch.no_grad():
        model.last.bias[1] = torch.nan
    assert diagnose(model, passes(model)).startswith("The model's last.bias is not finite: 1 of its 3 values")


def test_a_loss_that_is_not_finite_and_one_whose_gradient_is_large() -> None:
    model = Model()
    assert diagnose(model, passes(model, factor=torch.inf)) == (
        "All layers' outputs are finite, but the loss is not.")
    assert "its largest gradient is" in diagnose(model, passes(model, factor=1e25))


def test_a_later_pass_is_found() -> None:
    model = Model()

    def breaking() -> Iterator[Tensor]:
        yield from passes(model, 1)
        model.broken.where = "output"
        yield from passes(model, 1)

    assert "broken (Broken)" in diagnose(model, breaking())


@pytest.mark.parametrize("name", ["levels.0.flow.networks.0.hidden.1", "levels.1.encoder", "style"])
def test_a_layer_of_the_model_is_named(name: str) -> None:
    model = HFlow.from_config("tiny-16").train()
    model.initialize(torch.rand(4, 3, 16, 16) - 0.5)
    layer = model.get_submodule(name)
    weight_name, weight = next(layer.named_parameters())

    def spoiled() -> Iterator[Tensor]:
        with torch.no_grad():
            weight.view(-1)[0] = torch.inf
        yield model.loss(torch.rand(2, 3, 16, 16) - 0.5).mean()

    text = diagnose(model, spoiled())
    assert f"output of {name}.{weight_name.rpartition('.')[0]}".rstrip(".") in text
