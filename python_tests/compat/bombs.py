"""Small files that ask for much memory, time or stack. Run as a program: reads each one within a fixed memory."""

from __future__ import annotations

import io
import json
import resource
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, Callable

from hflow_fast.compat import import_file, read_original
from hflow_fast.errors import CheckpointError, ConfigError

from .writer import END, PROTOCOL_2, around, checkpoint, container, dumps, length, value

ALLOWED = 384 * 2**20
SECONDS = 10.0
"""Of processor time, as others may use the machine."""

_FLOATS = b"ctorch\nFloatStorage\n"
_OBJECT = b"chflow.network\nMultiStep\n)\x81"
_EMPTY = {"_parameters": {}, "_buffers": {}, "_modules": {}}


def _text(text: str) -> bytes:
    return b"X" + length(text.encode()) + text.encode()


def _tensor(elements: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    storage = b"(" + _text("storage") + _FLOATS + _text("0") + _text("cpu") + value(elements) + b"NtQ"
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + value(offset) + value(size) + value(stride)
            + b"\x89ccollections\nOrderedDict\n)RtR")


def _network(parameters: bytes) -> bytes:
    """A network whose only members are these items (names and values) of its parameters."""
    return PROTOCOL_2 + _OBJECT + value(_EMPTY) + _text("_parameters") + b"}(" + parameters + b"usb" + END


def _with_storage(pickled: bytes, claimed: int, content: bytes = b"") -> bytes:
    return checkpoint(container(pickled, ["0"], claimed.to_bytes(8, "little") + content))


def tensor_file(elements: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A network of one tensor "a", described so, whose storage has 16 elements."""
    pickled = _network(_text("a") + _tensor(elements, offset, size, stride))
    return _with_storage(pickled, 16, bytes(4 * 16))


def _zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**27))
    return buffer.getvalue()


def files() -> dict[str, tuple[bytes, str]]:
    """Files, and what is said about each one."""
    def one(elements: int) -> bytes:
        return _network(_text("a") + _tensor(elements, 0, (2,), (1,)))

    doubled = b"N" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(64))
    huge = (2**31 - 1).to_bytes(4, "little")
    shared = _text("a") + _tensor(2**20, 0, (2**20,), (1,)) + b"r\0\1\0\0"
    shared += b"".join(_text(f"a{n}") + b"j\0\1\0\0" for n in range(1000))
    itself = PROTOCOL_2 + _OBJECT + b"q\xff" + value(_EMPTY) + _text("_modules") + b"}" + _text("a") + b"h\xffssb" + END
    chain = PROTOCOL_2 + (_OBJECT + value(_EMPTY) + _text("_modules") + b"}" + _text("a" * 200)) * 3000
    chain += _OBJECT + value(_EMPTY) + b"b" + b"ssb" * 3000 + END
    return {
        "name": (huge + b"x" * 8, "its first text would have 2,147,483,647 bytes"),
        "source": (length(b"") + huge + b"x" * 8, "cut off or damaged: 2,147,483,647 bytes are announced"),
        "settings": (around(dumps({})) + huge, "its settings would have 2,147,483,647 bytes"),
        "text": (around(PROTOCOL_2 + b"X" + huge), "2,147,483,647 bytes are announced"),
        "text of 8 bytes' length": (around(PROTOCOL_2 + b"\x8d" + b"\xff" * 7 + b"\0" + END), "cut off or damaged"),
        "bytearray": (around(PROTOCOL_2 + b"\x96" + b"\xff" * 7 + b"\0" + END), "cut off or damaged"),
        "number": (around(PROTOCOL_2 + b"\x8b" + huge + b"1"), "2,147,483,647 bytes are announced"),
        "digits": (around(PROTOCOL_2 + b"L" + b"9" * 900_000 + b"L\n" + END), "no pickle at"),
        "memo": (around(PROTOCOL_2 + b"Nr\xff\xff\xff\xff" + END), "a part of the network is not a module"),
        "frame": (around(PROTOCOL_2 + b"\x95" + b"\xff" * 7 + b"\0" + END), "the opcode FRAME"),
        "storage": (_with_storage(one(2**40), 2**40), "bytes are announced at byte"),
        "storage's own length": (_with_storage(one(4), 2**62), "a storage has not the 4 elements"),
        "storage beyond integers": (around(one(2**70)), "something outside"),
        "expanded": (tensor_file(16, 0, (2**40,), (0,)), "does not fit its storage"),
        "one storage for many": (_with_storage(_network(shared), 2**20, bytes(2**22)), "claim more bytes than"),
        "zip": (_zip_bomb(), "a zip"),
        "opcodes": (around(PROTOCOL_2 + b"}" * 1_100_000 + END), "far longer than that of any model"),
        "bytes": (around(PROTOCOL_2 + (_text("x" * 2**20) + b"0") * 40 + END), "the opcode POP"),
        "long": (around(PROTOCOL_2 + (_text("x" * 2**20)) * 40 + END), "far longer than that of any model"),
        "nested lists": (around(PROTOCOL_2 + b"]" * 100_000 + b"a" * 99_999 + END), "is not a module"),
        "nested tuples": (around(PROTOCOL_2 + b")" + b"\x85" * 100_000 + END), "is not a module"),
        "nested marks": (around(PROTOCOL_2 + b"(" * 100_000 + END), "an unbalanced stack"),
        "doubled tuples": (around(PROTOCOL_2 + doubled + END), "is not a module"),
        "doubled tuples as a key": (around(PROTOCOL_2 + b"}" + doubled + b"Ns" + END), "neither text nor a small"),
        "colliding keys": (around(dumps({n * (2**61 - 1): 0 for n in range(1, 1000)})), "neither text nor a small"),
        "a module in itself": (around(itself), "is there twice"),
        "nested modules": (around(chain), "nested deeper than those of any network"),
        "nested settings": (around(dumps({}), settings=b"[" * 900_000), "not valid JSON (RecursionError)"),
        "nested settings, closed": (around(dumps({}), settings=b"[" * 800 + b"]" * 800), "not valid JSON (Recursion"),
        "digits in settings": (around(dumps({}), settings=b"9" * 900_000), "not valid JSON (ValueError)"),
    }


def settings(original: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Settings that ask for huge models, and what is said about each one beside weights of a small one."""
    result = {}
    for key, changed, said in (
        ("NUM_LAYERS", [10**12] * 3, "a network of 6,000,000,000,"),
        ("NUM_LAYERS", [4 * 10**6] * 3, "a network of 24,000,"),
        ("UNET_N_DOWNSCALES", [10**9] * 3, "a network of 12,000,000,"),
        ("RNVP_CHANNELS", [2**14] * 3, "does not fit this configuration"),
        ("ENCODER_CHANNELS", [2**40] * 3, "too large for any computer"),
        ("ENCODER_CHANNELS", [2**80] * 3, "too large for any computer"),
        ("RESOLUTIONS", [2**n for n in range(1000, 2, -1)], "CHANNELS has 3 entries"),
    ):
        parameters = original["MODEL_PARAMETERS"] | {key: changed}
        result[f"{key} = {str(changed)[:20]}"] = original | {"MODEL_PARAMETERS": parameters}, said
    return result


def main(weights: str, config: str) -> None:
    """Reads every file within ALLOWED more memory than the program has, and SECONDS each; prints what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bin"
        _limit_memory()
        for name, (data, said) in files().items():
            path.write_bytes(data)
            _expect(name, said, lambda: read_original(path))
        for name, (changed, said) in settings(json.loads(Path(config).read_text())).items():
            _expect(name, said, lambda: import_file(weights, changed))
    print("all read")


def _limit_memory() -> None:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    limit = int(line.split()[1]) * 1024 + ALLOWED
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        bytes(2 * ALLOWED)
        print("the limit does not hold")
    except MemoryError:
        pass


def _expect(name: str, said: str, read: Callable[[], Any]) -> None:
    start = time.process_time()
    try:
        read()
        print(f"{name}: was read")
    except (CheckpointError, ConfigError) as error:
        if said not in str(error):
            print(f"{name}: said {error}")
    except BaseException as error:
        print(f"{name}: {type(error).__name__} {str(error)[:300]}")
    if time.process_time() - start > SECONDS:
        print(f"{name}: took {time.process_time() - start:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
