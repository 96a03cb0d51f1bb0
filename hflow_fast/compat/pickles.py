"""Reads a pickle as a description of objects, without making any of them.

A pickle is a program for a small stack machine, and Python's own machine makes what the program says: it imports,
calls, instantiates and sets attributes, and an ``Unpickler`` with a guarded ``find_class`` still hashes, calls and
fills what it was allowed to find. Here the program is taken apart by the standard library's :mod:`pickletools`, which
never runs one, and the machine below knows only the opcodes that protocol 2 (``torch.save``'s) writes for plain data.
Where Python's would call or build, it notes down a :class:`Record`: the name, the arguments and the state. So what a
hostile file can get is a wrong description, not an action.

Work and memory are bounded: by the number of opcodes, the length of the pickle, and by dictionary keys that are
short to hash (text and small integers).
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import CheckpointError
from .bounded import BoundedFile

__all__ = ["Global", "Record", "Vocabulary", "read_pickle"]

_MOST_OPCODES = 1_000_000
"""The pickle of the paper's largest model, A-256, has 211,000."""
_LONGEST = 2**25
"""Bytes, without the tensors; that of A-256 has 674,000, with the source text of its classes."""


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. Nothing is looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        # Of the file, hence shown with everything escaped that could be more than a name.
        return f"{self.module}.{self.name}"[:200].encode("unicode_escape").decode()


@dataclass(eq=False, slots=True)
class Record:
    """An object the pickle describes: what would be called or instantiated, with which arguments, and its state."""

    made_by: Global
    arguments: tuple[Any, ...]
    state: Any = None

    def __repr__(self) -> str:  # not recursive: records may contain themselves
        return f"<{self.made_by}>"


class Vocabulary(Protocol):
    """What a pickle may speak of. Each method raises CheckpointError for what it does not know."""

    def find(self, name: Global) -> Global:
        """The name, if it is known."""

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        """What stands for the call: a record, or plain data."""

    def new(self, cls: Global, arguments: tuple[Any, ...]) -> Record:
        """What stands for the new object."""

    def persistent(self, identifier: Any) -> Any:
        """What stands for an object that is stored outside of the pickle."""


def read_pickle(file: BoundedFile, vocabulary: Vocabulary) -> Any:
    """The object that the pickle at the file's position describes; reading ends behind it.

    Plain data (None, bool, int, float, str, tuple, list, dict with keys of text or small integers) is itself.

    Raises:
        CheckpointError: the pickle is damaged, too long, or uses an opcode or a name that has no place here.
    """
    start = file.tell()
    machine = _Machine(vocabulary)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MOST_OPCODES or file.tell() - start > _LONGEST:
                raise CheckpointError("a pickle that is far longer than that of any model.")
            machine.step(opcode.name, argument)
        return machine.result()
    except CheckpointError:
        raise
    except (IndexError, KeyError, ValueError) as error:
        reason = str(error)[:200].encode("unicode_escape").decode()
        raise CheckpointError(f"damaged: no pickle at byte {start:,} ({type(error).__name__}: {reason}).") from None


class _Machine:
    """The stack, the stacks below its marks, and the numbered values."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "TUPLE":
                values = self._since_mark()
                self._stack.append(tuple(values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode[-1])
                values = tuple(stack[-length:])
                _require(len(values) == length, "a tuple of values that are not there")
                del stack[-length:]
                stack.append(values)
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                value = stack.pop()
                self._update([stack.pop(), value])
            case "SETITEMS":
                self._update(self._since_mark())
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(self._vocabulary.find(Global(module, name)))
            case "BINPERSID":
                stack.append(self._vocabulary.persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, made_by = stack.pop(), stack.pop()
                _require(type(arguments) is tuple and type(made_by) is Global, f"{opcode} of something without a name")
                make = self._vocabulary.call if opcode == "REDUCE" else self._vocabulary.new
                stack.append(make(made_by, arguments))
            case "BUILD":
                state = stack.pop()
                _require(type(stack[-1]) is Record, "the state of something that has none")
                stack[-1].state = state
            case "PROTO":
                _require(argument == 2, f"protocol {argument} instead of 2")
            case "STOP":
                pass
            case _:
                raise CheckpointError(f"the opcode {opcode}, which no checkpoint of the original uses; "
                                      "the file was not made by it.")

    def result(self) -> Any:
        _require(len(self._stack) == 1 and not self._below, "an unbalanced stack")
        return self._stack[0]

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def _extend(self, values: list[Any]) -> None:
        _require(type(self._stack[-1]) is list, "elements of something that is no list")
        self._stack[-1].extend(values)

    def _update(self, values: list[Any]) -> None:
        target = self._stack[-1]
        _require(type(target) is dict and len(values) % 2 == 0, "items of something that is no dictionary")
        for key, value in zip(values[::2], values[1::2]):
            # Nested tuples can take exponential time to hash, and large integers can be chosen to collide.
            _require(type(key) is str or type(key) is int and 0 <= key < 2**31,
                     "a dictionary key that is neither text nor a small number")
            target[key] = value


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise CheckpointError(f"damaged or not of the original: {otherwise}.")
