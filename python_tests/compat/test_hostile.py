"""Files that would run something if anything in them were run: refused by name. The canary is what they would make."""

from __future__ import annotations

import copyreg
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hflow_fast.compat import read_original
from hflow_fast.errors import CheckpointError

from .writer import MAGIC, PROTOCOL_2, SYSTEM, around, as_original, call, checkpoint, container, dumps, program, value

GETATTR = b"c__builtin__\ngetattr\n"
NETWORK = b"chflow.network\nMultiStep\n"
OBJECT = NETWORK + b")\x81"


class _Runs:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def attacks(canary: Path) -> dict[str, bytes]:
    """Pickles that make the canary when they are run, by the name that has to be refused."""
    code, shell = f"open({str(canary)!r}, 'w')", f"touch {canary}"
    script = canary.with_name("script.py")
    script.write_text(code)
    inner = canary.with_name("inner.pt")
    torch.save(_Runs(shell), inner)
    return {
        "posix.system": dumps(_Runs(shell)),
        "os.system": call("os.system", shell),
        "subprocess.getoutput": call("subprocess.getoutput", shell),
        "builtins.eval": call("builtins.eval", code),
        "__builtin__.eval": call("__builtin__.eval", code),
        "builtins.exec": call("builtins.exec", code),
        "builtins.open": call("builtins.open", str(canary), "w"),
        "runpy.run_path": call("runpy.run_path", str(script)),
        "torch.storage._load_from_bytes": call("torch.storage._load_from_bytes", inner.read_bytes()),
        "timeit.main": call("timeit.main", ["-n1", "-r1", code]),
    }


@pytest.fixture
def refused(write, canary):
    """Checks that the reader refuses a file, saying something, and that nothing was run."""

    def refused(data: bytes, *said: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            read_original(write(data))
        for words in said:
            assert words in str(caught.value)
        assert not canary.exists()

    return refused


def test_calls_are_refused_by_name(refused, canary):
    for name, pickled in attacks(canary).items():
        refused(around(pickled), f"refused: it names {name},", "Nothing was imported or run")
        try:  # the attack is a real one
            pickle.loads(pickled)
        except Exception:
            pass
        assert canary.exists(), name
        canary.unlink()


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("part", ["network", "optimizer"])
def test_calls_are_refused_in_every_pickle_of_the_file(refused, canary, part, place):
    pickles = [dumps(MAGIC), dumps(1001), dumps(SYSTEM), dumps({}), dumps([])]
    pickles[place] = call("os.system", f"touch {canary}")
    parts = {"network": container(dumps({}))} | {part: b"".join(pickles)}
    refused(checkpoint(**parts), "refused: it names os.system,")


@pytest.mark.parametrize("name", [
    "builtins.getattr", "builtins.__import__", "importlib.import_module", "operator.attrgetter", "functools.partial",
    "types.FunctionType", "pickle.loads", "copyreg._reconstructor", "copyreg.__newobj__", "shutil.rmtree",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch._utils._rebuild_tensor",
    "torch._utils._import_dotted_name", "numpy.load", "torch.FloatTensor", "torch.nn.modules.linear.Linear",
    "torch.nn.modules.module.Module", "hflow.network.Backdoor", "hflow.utils.Network", "network.MultiStep",
])
def test_other_names_are_refused(refused, name):
    refused(around(call(name)), f"refused: it names {name},")


@pytest.mark.parametrize(("module", "name"), [
    ("hflow.network", "MultiStep.__init__.__globals__"), ("collections", "OrderedDict.__init__"),
    ("torch", "FloatStorage.__class__"), ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch", "os.system"),
    ("torch", "serialization.os.system"), ("", "os.system"), ("os", ""),
])
def test_names_with_dots_are_not_walked(refused, module, name):
    refused(around(program(f"c{module}\n{name}\n".encode())), f"refused: it names {module}.{name},")


def test_names_cannot_write_to_the_terminal(refused):
    refused(around(program(b"c\x1b[2Jos\nsys\rtem\n")), r"refused: it names \x1b[2Jos.sys\rtem,")


@pytest.mark.parametrize("arguments", [
    GETATTR + b"X\x08\x00\x00\x00__self__\x86",  # getattr(getattr, "__self__")
    NETWORK + b"X\x08\x00\x00\x00__init__\x86",  # of a class
    OBJECT + b"X\x09\x00\x00\x00__class__\x86",
    OBJECT + b"X\x0b\x00\x00\x00prior.__x__\x86",
    OBJECT + b"X\x05\x00\x00\x00prior" + OBJECT + b"\x87",  # with a default
    b"X\x00\x00\x00\x00X\x06\x00\x00\x00format\x86",
])
def test_getattr_is_for_methods_of_the_network_only(refused, arguments):
    refused(around(program(GETATTR, arguments, b"R")), "refused: it calls __builtin__.getattr")


def test_what_getattr_stands_for_cannot_be_called(refused):
    method = GETATTR + OBJECT + b"X\x05\x00\x00\x00prior\x86R"
    refused(around(program(method, b")R")), "REDUCE of something without a name")


@pytest.mark.parametrize(("opcodes", "said"), [
    (NETWORK + b")R", "refused: it calls hflow.network.MultiStep"),
    (NETWORK + b"K\x01\x85\x81", "refused: it makes an object of hflow.network.MultiStep"),
    (GETATTR + b")\x81", "refused: it makes an object of __builtin__.getattr"),
    (b"ccollections\nOrderedDict\n" + value(([["a", 1]],)) + b"R", "refused: it calls collections.OrderedDict"),
    (b"ctorch\nFloatStorage\n)R", "refused: it calls torch.FloatStorage"),
    (b"ctorch._utils\n_rebuild_parameter\n" + OBJECT + b"\x88}\x87R", "refused: it calls torch._utils._rebuild_par"),
    (NETWORK + b"}b", "the state of something that has none"),  # would set attributes of the class
    (b"]}b", "the state of something that has none"),
    (OBJECT + value("key") + value("value") + b"s", "items of something that is no dictionary"),
    (OBJECT + b"K\x01a", "elements of something that is no list"),
    (value(("storage", "torch.FloatStorage", "0", "cpu", 1, None)) + b"Q", "refused: it refers to something outside"),
    (b"(X\x06\x00\x00\x00modulecos\nsystem\nNNtQ", "refused: it names os.system,"),
    (b"(X\x06\x00\x00\x00modulectorch\nFloatStorage\nNNtQ", "refused: it refers to something outside"),
    (value("a path") + b"Q", "refused: it refers to something outside"),
])
def test_misused_names_are_refused(refused, opcodes, said):
    refused(around(program(opcodes)), said)


@pytest.mark.parametrize(("opcodes", "opcode"), [
    (b"\x82\xc8", "EXT1"), (b"\x83\xc8\x00", "EXT2"), (b"\x84\xc8\x00\x00\x00", "EXT4"),
    (b"\x8c\x02os\x8c\x06system\x93", "SHORT_BINUNICODE"), (value("os") + value("system") + b"\x93", "STACK_GLOBAL"),
    (b"(ios\nsystem\n", "INST"), (b"(" + NETWORK + b"o", "OBJ"), (NETWORK + b")}\x92", "NEWOBJ_EX"),
    (b"Pcanary\n", "PERSID"), (b"\x97", "NEXT_BUFFER"), (b"(\x91", "FROZENSET"), (b"\x8f", "EMPTY_SET"),
    (b"N2", "DUP"), (b"NN0", "POP"), (b"N(1", "POP_MARK"), (b"I1\n", "INT"), (b"\x8b\x01\x00\x00\x00\x01", "LONG4"),
])
def test_other_opcodes_are_refused(refused, opcodes, opcode):
    copyreg.add_extension("os", "system", 0xC8)
    try:
        refused(around(program(opcodes)), f"the opcode {opcode},")
    finally:
        copyreg.remove_extension("os", "system", 0xC8)
    refused(around(program(b"N").replace(PROTOCOL_2, b"\x80\x04")), "protocol 4 instead of 2")


def test_state_is_never_applied(tmp_path, write, canary):
    """Attributes that would give an object another class, or code, are as inert as any others."""
    weights = {"a": torch.arange(3.0)}
    data = as_original(weights, None, tmp_path, canary)
    old = value("function")[:-2]  # an attribute's name, without its number in the memo
    assert data.count(old) == 1
    for attribute in ("__class__", "__dict__", "__reduce__", "__setstate__", "__getattr__", "__del__"):
        new = value(attribute)[:-2]
        got = read_original(write(data.replace(old, new))).weights
        assert got.keys() == weights.keys() and torch.equal(got["a"], weights["a"])
        assert not canary.exists()


def test_a_network_that_is_something_else(refused):
    refused(around(dumps({"_parameters": {}})), "a part of the network is not a module")
    refused(around(program(OBJECT)), "a part of the network is not a module")
    refused(around(program(OBJECT, value((1, 2)), b"b")), "a part of the network is not a module")
    refused(around(program(OBJECT, value({"_parameters": []}), b"b")), "a module's _parameters")
    leaf = OBJECT.replace(b"MultiStep", b"MyConv") + value({"_parameters": {}, "_buffers": {}, "_modules": {}}) + b"b"
    refused(around(program(leaf)), "it holds a hflow.network.MyConv")
