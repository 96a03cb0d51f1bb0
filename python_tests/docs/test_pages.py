"""What README.md and docs/*.md show is true: links lead somewhere, Python and commands fit the code, examples run.

A Python block below the comment ``<!-- runs -->`` is executed, all those of a page one after the other; the imports and
attributes of ``hflow_fast`` in every other block are looked up.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Iterator

import click
import pytest
import torch

from hflow_fast.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OPTIONAL = {"normflows", "FrEIA", "nflows"}
"""Libraries of a test extra, without which examples that need them are skipped."""
BLOCK = re.compile(r"(<!-- runs -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _id(page: Path) -> str:
    return page.name


def _blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """Whether it runs, and its text."""
    return [(bool(mark), text) for mark, kind, text in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links to {target}"


def _anchors(page: Path) -> set[str]:
    """As GitHub and MyST make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if any(runs for runs, _ in _blocks(page, "python"))], ids=_id)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(text for runs, text in _blocks(page, "python") if runs)
    for library in _imported(code) & OPTIONAL:
        pytest.importorskip(library)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, page.name, "exec"), {"__name__": "__main__"})


def _imported(code: str) -> set[str]:
    """The packages that it imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in names}


def test_there_are_examples():
    assert sum(runs for page in PAGES for runs, _ in _blocks(page, "python")) >= 5


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_python_names_exist(page):
    for _, text in _blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hflow_fast":
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), ast.unparse(node)
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("hflow_fast."):
                value = importlib.import_module("hflow_fast")
                for name in ast.unparse(node).split(".")[1:]:
                    value = getattr(value, name)


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_commands_exist(page):
    for line, arguments in _commands(page):
        command: click.Command = main
        context = click.Context(main)
        while arguments and isinstance(command, click.Group):
            found = command.get_command(context, arguments[0]) if not arguments[0].startswith("-") else None
            assert found or arguments[0] in ("-h", "--help", "--version"), line
            if found is None:
                break
            command, arguments = found, arguments[1:]
        options = {name: option for option in command.params if isinstance(option, click.Option)
                   for name in (*option.opts, *option.secondary_opts)} | {"--help": None, "-h": None, "--version": None}
        given = [argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-z]", argument)]
        assert set(given) <= set(options), line


def _commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Lines of shell blocks, and commands in the running text, that call hflow-fast, and what follows it."""
    text = page.read_text()
    lines = [line for kind in ("sh", "bash", "") for _, block in _blocks(page, kind)
             for line in block.replace("\\\n", " ").splitlines()]
    lines += [code.replace("\\|", "|") for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))]
    for line in lines:
        found = re.search(r"(?:^|\s)(?:hflow-fast|-m hflow_fast)(?=\s)(.*)", line.partition(" #")[0])
        if found:
            yield line, shlex.split(re.split(r"[|;&>]", found[1])[0])
