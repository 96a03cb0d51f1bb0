"""The documentation site builds without a warning and has a place for every public name, command and option."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import click
import pytest

import hflow_fast
from hflow_fast.cli import main

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built offline on a machine without GPUs."""
    out = tmp_path_factory.mktemp("site")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("HFLOW_FAST_INTERSPHINX", None)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "docs", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_public_name_is_in_the_reference(site):
    described = {id(_value(name)) for name in _python_objects(site)}
    missing = [f"{module.__name__}.{name}" for module in _public_modules() for name in module.__all__
               if not name.startswith("__") and id(getattr(module, name)) not in described]
    assert not missing


def test_fields_and_methods_are_in_the_reference(site):
    names = _python_objects(site)
    assert {"hflow_fast.training.GeneralConfig.ema_weight", "hflow_fast.models.LevelTerms.log_prior",
            "hflow_fast.models.HFlow.latent_shapes", "hflow_fast.nn.ActNorm.forward"} <= names


def test_every_command_and_option_is_in_the_reference(site):
    page = unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "command-line.html").read_text()))
    wanted = [f"hflow-fast {path}" for path, _ in _commands(main)]
    wanted += [option for _, command in _commands(main) for parameter in command.params
               if isinstance(parameter, click.Option) for option in parameter.opts]
    assert not [text for text in wanted if text not in page]


def test_docstring_markup_is_rendered(site):
    page = (site / "reference" / "ops.html").read_text()
    assert r"\(\sigma(s + 2)\)" in page  # math, for MathJax
    assert re.search(r'href="[^"]*#hflow_fast\.ops\.CouplingSpec"[^>]*><span class="pre">CouplingSpec', page)  # a type
    assert "Args:" not in page


def _public_modules():
    yield hflow_fast
    for entry in pkgutil.walk_packages(hflow_fast.__path__, "hflow_fast."):
        if "._" not in entry.name and not entry.name.startswith("hflow_fast.cli"):
            module = importlib.import_module(entry.name)
            if hasattr(module, "__all__"):
                yield module


def _python_objects(site: Path) -> set[str]:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {name for kind, names in inventory.data.items() if kind.startswith("py:") and kind != "py:module"
            for name in names}


def _value(name: str) -> object:
    """What a dotted name stands for, or None where it is a field without a default."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[end:]:
        value = getattr(value, part, None)
    return value


def _commands(group: click.Group, prefix: str = ""):
    for name, command in group.commands.items():
        yield f"{prefix}{name}", command
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
