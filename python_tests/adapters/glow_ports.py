"""The ports of Glow that the tests run: stand-ins, and the real one in a checkout that GLOW_PYTORCH names.

``GLOW_PYTORCH=/path/to/glow-pytorch pytest python_tests/adapters``: one at a time, as all call their modules the same.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hflow_fast.adapters import AccelerationReport, accelerate

from . import chaiyujin_stand_in, rosinality_stand_in
from .conftest import perturbed

IMAGES = (4, 3, 8, 8)
VARIANTS = [("affine", "lu"), ("affine", "plain"), ("additive", "lu"), ("affine", "shuffle"), ("additive", "reverse")]


@dataclass(frozen=True)
class Port:
    """A port of Glow: how a small model of it is built, and how it is used."""

    name: str
    accumulates: bool
    """Whether log-dets are handed on, as in chaiyujin's and y0ast's."""
    build: Callable[[str, str], nn.Module]
    """(coupling, permutation) → model."""
    scale: float = 0.05
    """How far training moved the weights."""
    copies: bool = True
    """Whether a copy of a stock model is right: y0ast's layers hold functions that go on to use the original's."""

    def __str__(self) -> str:
        return self.name

    def variants(self) -> Iterator[tuple[str, str]]:
        for coupling, permutation in VARIANTS:
            if self.accumulates or permutation in ("lu", "plain"):
                yield coupling, permutation

    def trained(self, coupling: str = "affine", permutation: str = "lu") -> nn.Module:
        """A model as after some training; the same one every time."""
        torch.manual_seed(0)
        np.random.seed(0)
        model = self.build(coupling, permutation).train()
        with torch.no_grad():
            self.encode(model, torch.randn(16, *IMAGES[1:]))
        return perturbed(model, self.scale).eval()

    def pair(self, coupling: str = "affine", permutation: str = "lu",
             dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, AccelerationReport]:
        """A stock model, the same one accelerated, and the report of it."""
        stock, fast = (self.trained(coupling, permutation).to(dtype) for _ in range(2))
        return stock, fast, accelerate(fast)

    def encode(self, model: nn.Module, x: Tensor) -> Any:
        """Everything that a model says of images."""
        return model(x, x.new_zeros(len(x))) if self.accumulates else model(x)

    def decode(self, model: nn.Module, *latents: Tensor) -> Tensor:
        """Images of latents; those of splits are drawn where the port draws them."""
        if self.accumulates:
            return model(*latents, 0.0, True, 0.7)
        return model.reverse(list(latents))

    def latents(self, count: int = 4) -> tuple[Tensor, ...]:
        """Of a model of two levels."""
        shapes = [(24, 2, 2)] if self.accumulates else [(6, 4, 4), (24, 2, 2)]
        generator = torch.Generator().manual_seed(2)
        return tuple(torch.randn(count, *shape, generator=generator) for shape in shapes)


def _rosinality(module: ModuleType) -> Callable[[str, str], nn.Module]:
    return lambda coupling, permutation: module.Glow(3, 2, 2, affine=coupling == "affine", conv_lu=permutation == "lu")


def _chaiyujin(module: ModuleType) -> Callable[[str, str], nn.Module]:
    def build(coupling: str, permutation: str) -> nn.Module:
        return module.FlowNet((8, 8, 3), 8, 2, 2, flow_coupling=coupling, LU_decomposed=permutation == "lu",
                              flow_permutation=permutation if permutation in ("shuffle", "reverse") else "invconv")

    return build


def _y0ast(module: ModuleType) -> Callable[[str, str], nn.Module]:
    def build(coupling: str, permutation: str) -> nn.Module:
        return module.FlowNet((8, 8, 3), 8, 2, 2, 1.0,
                              permutation if permutation in ("shuffle", "reverse") else "invconv", coupling,
                              permutation == "lu")

    return build


def _real(checkout: Path) -> Port:
    sys.path.insert(0, str(checkout))
    if (checkout / "glow" / "models.py").exists():
        return Port("chaiyujin", True, _chaiyujin(importlib.import_module("glow.models")))
    module = importlib.import_module("model")
    if (checkout / "modules.py").exists():
        return Port("y0ast", True, _y0ast(module), copies=False)
    return Port("rosinality", False, _rosinality(module), scale=0.003)


PORTS = [Port("rosinality-stand-in", False, _rosinality(rosinality_stand_in)),
         Port("chaiyujin-stand-in", True, _chaiyujin(chaiyujin_stand_in)),
         *([_real(Path(os.environ["GLOW_PYTORCH"]))] if "GLOW_PYTORCH" in os.environ else [])]
each_port = pytest.mark.parametrize("port", PORTS, ids=str)
each_variant = pytest.mark.parametrize(
    ("port", "coupling", "permutation"),
    [pytest.param(port, *variant, id=f"{port}-{'-'.join(variant)}") for port in PORTS for variant in port.variants()])
