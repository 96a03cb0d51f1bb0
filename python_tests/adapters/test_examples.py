"""The examples of accelerate run, are short, and what they accelerate still does what it did."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {"normflows": "normflows", "freia": "FrEIA", "nflows": "nflows"}


def run(name: str, monkeypatch: pytest.MonkeyPatch, accelerated: bool = True) -> dict[str, object]:
    """The names that the example has at its end; not accelerated: without its line that does it."""
    path = EXAMPLES / f"accelerate_{name}.py"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if accelerated:
            return runpy.run_path(str(path), run_name="__main__")
        with monkeypatch.context() as patch:
            patch.setattr("hflow_fast.accelerate", lambda model: None)
            return runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch):
    """A checkout of rosinality/glow-pytorch, named by GLOW_PYTORCH, from which its model.py can be imported."""
    folder = os.environ.get("GLOW_PYTORCH")
    code = Path(folder or "", "model.py")
    if folder is None or not code.is_file() or "class InvConv2dLU" not in code.read_text():
        pytest.skip("GLOW_PYTORCH names no checkout of rosinality/glow-pytorch")
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("model", None)


def assert_same(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = run(name, monkeypatch, accelerated=False)
    capsys.readouterr()
    after = run(name, monkeypatch)
    output = capsys.readouterr().out
    assert "replaced " in output and "nothing replaced" not in output
    assert before["model"].state_dict().keys() == after["model"].state_dict().keys()
    torch.testing.assert_close(after["images"], before["images"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PACKAGES)
def test_accelerate(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(PACKAGES[name])
    assert_same(name, monkeypatch, capsys)


def test_accelerate_glow_pytorch(checkout, monkeypatch, capsys) -> None:
    pytest.importorskip("scipy")
    assert_same("glow_pytorch", monkeypatch, capsys)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("accelerate_*.py")), ids=lambda path: path.stem)
def test_ten_lines_or_fewer(path: Path) -> None:
    _docstring, *statements = ast.parse(path.read_text()).body
    lines = {number for statement in statements for number in range(statement.lineno, statement.end_lineno + 1)}
    assert len(lines) <= 10


def test_every_library_has_one() -> None:
    names = {path.stem.removeprefix("accelerate_") for path in EXAMPLES.glob("accelerate_*.py")}
    assert names == {*PACKAGES, "glow_pytorch"}
