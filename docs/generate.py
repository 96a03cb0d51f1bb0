"""The pages that are made from the code: the reference of the Python interface and of the command line.

A module is public if no part of its name starts with an underscore; its ``__all__`` says which of its names are. A name
that a package takes from one of its modules is described once, at the package.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Iterator

import click

import hflow_fast
from hflow_fast.cli import main

__all__ = ["is_public", "public_names", "write_pages"]

_NOT_INTERFACE = ("cli",)  # described as commands


def write_pages(folder: Path) -> None:
    """Writes one page per package directly below ``hflow_fast``, and that of the commands, and removes older ones."""
    pages = {"hflow_fast": _module_page([hflow_fast]), "command-line": _command_page()}
    for room in _rooms():
        if any(public_names(module) for module in room):
            pages[room[0].__name__.split(".")[1]] = _module_page(room)
    folder.mkdir(exist_ok=True)
    for stale in set(folder.glob("*.rst")) - {folder / f"{name}.rst" for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != text:  # so that Sphinx reads again only what has changed
            path.write_text(text)


def public_names(module: ModuleType) -> list[str]:
    """The names to describe at ``module``: of its ``__all__``, those that no other page describes."""
    above = module.__name__.split(".")[:-1]
    offered = [importlib.import_module(".".join(above[:end])) for end in range(1, len(above) + 1)]
    return [name for name in getattr(module, "__all__", [])
            if not name.startswith("__")
            and _room_of(getattr(module, name), module) == _room(module.__name__)
            and not any(name in getattr(package, "__all__", []) for package in offered)]


def is_public(target: str) -> bool:
    """Whether the dotted name is one of a public module's ``__all__``, or of a member of one."""
    parts = target.split(".")
    if any(part.startswith("_") for part in parts):
        return False
    for end in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return parts[end] in getattr(module, "__all__", [])
    return False


def _rooms() -> Iterator[list[ModuleType]]:
    """The packages and modules directly below hflow_fast, each followed by all that is in it."""
    for entry in pkgutil.iter_modules(hflow_fast.__path__):
        if entry.name.startswith("_") or entry.name in _NOT_INTERFACE:
            continue
        package = importlib.import_module(f"hflow_fast.{entry.name}")
        inside = pkgutil.walk_packages(package.__path__, f"{package.__name__}.") if entry.ispkg else []
        names = [module.name for module in inside if not any(part.startswith("_") for part in module.name.split("."))]
        yield [package, *map(importlib.import_module, names)]


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _room_of(value: object, offering: ModuleType) -> str:
    """The room in which ``value`` is defined; that of the offering module, where Python does not know or at the top."""
    home = getattr(value, "__module__", None) or ""
    if offering is hflow_fast or not home.startswith("hflow_fast."):
        return _room(offering.__name__)
    return _room(home)


def _module_page(modules: list[ModuleType]) -> str:
    lines = []
    for index, module in enumerate(modules):
        title, names = module.__name__, public_names(module)
        if index and not names:
            if inspect.ismodule(getattr(modules[0], title.split(".")[-1], module)):  # else a function has that name
                lines += [f".. py:module:: {title}", "   :no-index-entry:", ""]  # where links to the module lead
            continue
        lines += [title, ("-" if index else "=") * len(title), "", f".. automodule:: {title}", "   :no-members:", ""]
        borrowed = [name for name in getattr(module, "__all__", [])
                    if _room_of(getattr(module, name), module) != _room(title)]
        if borrowed:
            links = ", ".join(f":obj:`~{_room_of(getattr(module, name), module)}.{name}`" for name in borrowed)
            lines += [f"Also here: {links}.", ""]
        for name in names:
            kind = _kind(getattr(module, name))
            if kind == "data":
                lines += [f".. autodata:: {_home(modules, name)}.{name}", "   :no-value:", ""]
            else:
                lines += [f".. auto{kind}:: {title}.{name}", ""]
    return "\n".join(lines)


def _home(modules: list[ModuleType], name: str) -> str:
    """The innermost module that offers ``name``: the docstring of a constant is found in the file that sets it only."""
    return [module.__name__ for module in modules if name in getattr(module, "__all__", [])][-1]


def _kind(value: object) -> str:
    if isinstance(value, type):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if callable(value) else "data"


def _command_page() -> str:
    root = click.Context(main, info_name="hflow-fast")
    title = "Command line"
    intro = ("``hflow-fast COMMAND``; ``python -m hflow_fast COMMAND`` is the same. What a user can cause is told in "
             "one line, with exit code 2.")
    return "\n".join([title, "=" * len(title), "", intro, "", *_command_lines(main, root)])


def _command_lines(command: click.Command, context: click.Context) -> Iterator[str]:
    """A section per command, those of a group behind it, in the order of ``--help``."""
    if command is not main:
        yield from _section(command, context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            yield from _command_lines(child, click.Context(child, info_name=name, parent=context))


def _section(command: click.Command, context: click.Context) -> Iterator[str]:
    path = context.command_path
    yield from [f".. _{path.replace(' ', '-')}:", "", path, "-" * len(path), "", "::", ""]
    yield f"   {path} {' '.join(command.collect_usage_pieces(context))}"
    yield from ["", *_prose(command.help or ""), ""]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            names, text = record
            yield f"``{names}``"
            yield f"   {_escaped(text)}"
            yield ""


def _prose(text: str) -> Iterator[str]:
    """Paragraphs of a help text; those that click keeps as they are become blocks of code."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield from ["::", "", textwrap.indent(paragraph[2:], "   "), ""]
        else:
            yield from [_escaped(" ".join(paragraph.split())), ""]


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "*`|_\\" else character for character in text)
