"""The checkpoint files of the original implementation (timoneh/hflow, ``Network.save``), read as data.

Layout: the name of the module that defines the network and its source text, each after its length (4 bytes,
little-endian); two legacy containers of PyTorch (:mod:`.legacy`), the pickled network and the optimizer's state;
and the settings as JSON, after their length. The original runs the source text when it loads a file. Here it is
skipped, and the network is read as a description of its modules (:mod:`.pickles`).

The network is the moving average: the original saves its EMA copy, together with the optimizer of the raw weights.
So the file has one set of weights, the one that its tools for samples and metrics use.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .bounded import BoundedFile
from .legacy import Container, read_container
from .pickles import Global, Record

__all__ = ["OriginalFile", "read_original"]

_NETWORK = Global("hflow.network", "MultiStep")
_MODULES = {
    _NETWORK,
    *(Global("hflow.network", name) for name in (
        "Actnorm", "CouplingCNN", "EncoderDecoder", "EncoderDecoderBlock", "GlobalStateNetwork", "MyConv", "MyLinear",
        "OneStep", "PartitionedEndblock", "Permute", "PoolingCouplingCNN", "ResolutionSteps", "Step", "Unet",
        "UnitaryPermute")),
    Global("torch.nn.modules.container", "ModuleList"),
    Global("torch.nn.modules.linear", "Identity"),
}

_LONGEST_NAME = 256
_LONGEST_PREFIX = 1024
_LONGEST_SETTINGS = 2**20
_DEEPEST_SETTINGS = 16
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class OriginalFile:
    """What a checkpoint file of the original holds."""

    weights: dict[str, Tensor]
    """The network's state dict, by the original's names."""
    settings: dict[str, Any] | None
    """The settings; files of early versions have none."""
    source_bytes: int
    """Length of the embedded source text, and of that beside the pickled classes. None of it was run."""
    optimizer_bytes: int
    """Size of the optimizer's tensors, which were not read."""


def read_original(path: str | os.PathLike[str]) -> OriginalFile:
    """Reads a checkpoint file of the original. Nothing in it is run or imported.

    Raises:
        CheckpointError: the file is missing, damaged, or not of that kind; or it names something that no such file
            needs, which the text repeats.
    """
    path = Path(path)
    try:
        with path.open("rb") as opened:
            return _read(BoundedFile(opened))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read(file: BoundedFile) -> OriginalFile:
    if file.size >= 4 and file.content(0, 4) == _ZIP:
        raise CheckpointError("a zip, as torch.save writes by default; the original's checkpoints are none. Save the "
                              "state dict of its network as safetensors and import that, with --config.")
    length = file.number(4)
    if length > _LONGEST_NAME:
        raise CheckpointError(f"not a checkpoint of the original: its first text would have {length:,} bytes.")
    file.skip(length)
    source_bytes = file.number(4)
    file.skip(source_bytes)
    network = read_container(file, _MODULES)
    optimizer = read_container(file)
    settings = _settings(file)
    return OriginalFile(
        weights=_state_dict(network, file.size),
        settings=settings,
        source_bytes=source_bytes + network.source_characters,
        optimizer_bytes=optimizer.tensor_bytes,
    )


def _state_dict(network: Container, most_bytes: int) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names, as ``Module.state_dict`` gives them."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    total = 0
    waiting = [("", network.root)]
    while waiting:
        prefix, module = waiting.pop()
        if type(module) is not Record or module.made_by not in _MODULES or type(module.state) is not dict:
            raise CheckpointError("damaged: a part of the network is not a module.")
        if not prefix and module.made_by != _NETWORK:
            raise CheckpointError(f"it holds a {module.made_by} instead of the original's network.")
        if len(prefix) > _LONGEST_PREFIX:
            raise CheckpointError("damaged: its modules are nested deeper than those of any network.")
        if id(module) in seen:
            raise CheckpointError(f"damaged: the module {prefix[:-1][:200]!r} is there twice.")
        seen.add(id(module))
        for kind in ("_parameters", "_buffers"):
            for name, value in _members(module, kind):
                if value is None:
                    continue
                if prefix + name in tensors:
                    raise CheckpointError(f"damaged: the tensor {(prefix + name)[:200]!r} is there twice.")
                tensor = tensors[prefix + name] = network.tensor(value)
                total += tensor.nbytes
                if total > most_bytes:
                    raise CheckpointError("its tensors claim more bytes than the file has.")
        waiting += [(f"{prefix}{name}.", child) for name, child in _members(module, "_modules") if child is not None]
    return tensors


def _members(module: Record, kind: str) -> list[tuple[str, Any]]:
    members = module.state.get(kind)
    if type(members) is not dict or not all(type(name) is str and len(name) <= _LONGEST_NAME for name in members):
        raise CheckpointError(f"damaged: a module's {kind} are missing or not what they should be.")
    return list(members.items())


def _settings(file: BoundedFile) -> dict[str, Any] | None:
    if file.tell() == file.size:
        return None
    length = file.number(4)
    if length > _LONGEST_SETTINGS:
        raise CheckpointError(f"damaged: its settings would have {length:,} bytes.")
    text = file.read(length)
    if file.tell() != file.size:
        raise CheckpointError(f"damaged: {file.size - file.tell():,} bytes follow its settings, the last part.")
    try:
        settings = json.loads(text)
        _check_depth(settings)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"its settings are not valid JSON ({type(error).__name__}).") from None
    if type(settings) is not dict:
        raise CheckpointError("its settings are not a JSON object.")
    return settings


def _check_depth(settings: Any) -> None:
    """Raises RecursionError for nesting that would exhaust the stack of whatever goes through it next."""
    level = [settings]
    for _ in range(_DEEPEST_SETTINGS):
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise RecursionError
