"""PyTorch's legacy container (``torch.save`` with ``_use_new_zipfile_serialization=False``), read as data.

Layout: four pickles (a magic number, the protocol version, facts about the machine, the object), a pickle with the
keys of the storages, and per storage its number of elements (8 bytes) and its little-endian content. Inside the
object a storage is a persistent id ``("storage", type, key, location, elements, None)``, and the first mention of
every module class is ``("module", class, source file, source text)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Collection

import torch
from torch import Tensor

from ..errors import CheckpointError
from .bounded import BoundedFile
from .pickles import Global, Record, read_pickle

__all__ = ["Container", "Storage", "read_container"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MOST_DIMENSIONS = 8

_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}
_STORAGES = {Global(module, name): dtype for module in ("torch", "torch.cuda") for name, dtype in _DTYPES.items()}

_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = Global("collections", "OrderedDict")
_GETATTR = Global("__builtin__", "getattr")
_FUNCTIONS = {
    _REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT,
    _GETATTR,  # methods that the original keeps as attributes: getattr(module, "interpolate_up")
    Global("__builtin__", "set"),
    # NumPy scalars, and the bytes in them, which protocol 2 writes as text
    Global("numpy", "dtype"), Global("numpy.core.multiarray", "scalar"), Global("numpy._core.multiarray", "scalar"),
    Global("_codecs", "encode"),
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A persistent id: the content of one or more tensors."""

    key: str
    dtype: torch.dtype
    elements: int


@dataclass(frozen=True)
class Container:
    """What one container holds. ``root`` is plain data and records."""

    root: Any
    storages: dict[str, Storage]
    source_characters: int
    """Length of the Python text that came with the classes and was not looked at."""
    _file: BoundedFile = field(repr=False)
    _positions: dict[str, int] = field(repr=False)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all storages."""
        return sum(storage.elements * storage.dtype.itemsize for storage in self.storages.values())

    def tensor(self, value: Any) -> Tensor:
        """The tensor that a record describes, in memory of its own.

        Raises:
            CheckpointError: it is no tensor, reaches beyond its storage, or does not fill the range that it spans: so
                a tensor takes no more memory than it takes in the file.
        """
        if type(value) is Record and value.made_by == _REBUILD_PARAMETER:
            value = value.arguments[0]
        if type(value) is not Record or value.made_by != _REBUILD_TENSOR:
            raise CheckpointError("not a tensor where one belongs.")
        storage, offset, size, stride = value.arguments[:4]
        elements, extent = 1, 1
        for length, step in zip(size, stride):
            elements *= length
            extent += (length - 1) * step
        if elements != extent or offset + extent > storage.elements:
            raise CheckpointError(f"a tensor of size {size}, stride {stride} and offset {offset} does not fit its "
                                  f"storage of {storage.elements:,} elements.")
        width = storage.dtype.itemsize
        data = self._file.content(self._positions[storage.key] + offset * width, extent * width)
        return torch.frombuffer(data, dtype=storage.dtype).as_strided(size, stride).contiguous()


def read_container(file: BoundedFile, modules: Collection[Global] = ()) -> Container:
    """Reads the container at the file's position up to its end; the contents of its storages stay in the file.

    Args:
        modules: the module classes that may occur in it.

    Raises:
        CheckpointError: it is damaged, or speaks of anything but tensors, plain data and these modules.
    """
    magic, protocol, machine = (read_pickle(file, _TorchVocabulary()) for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or type(machine) is not dict:
        raise CheckpointError("not a file of torch.save in its legacy format, which the original's are.")
    if machine.get("little_endian") is not True:
        raise CheckpointError("it was saved on a big-endian machine, which is not supported.")
    vocabulary = _TorchVocabulary(modules)
    root = read_pickle(file, vocabulary)
    keys = read_pickle(file, _TorchVocabulary())
    storages = vocabulary.storages
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise CheckpointError("damaged: the list of its storages is not that of its tensors.")
    positions = {}
    for key in keys:
        storage = storages[key]
        if file.number(8) != storage.elements:
            raise CheckpointError(f"damaged: a storage has not the {storage.elements:,} elements that are announced.")
        positions[key] = file.skip(storage.elements * storage.dtype.itemsize)
    return Container(root, storages, vocabulary.source_characters, file, positions)


class _TorchVocabulary:
    """Tensors, a few helpers of the pickling of plain objects, and the given module classes."""

    def __init__(self, modules: Collection[Global] = ()) -> None:
        self._modules = modules
        self.storages: dict[str, Storage] = {}
        self.source_characters = 0

    def find(self, name: Global) -> Global:
        if name in _FUNCTIONS or name in _STORAGES or name in self._modules:
            return name
        raise CheckpointError(f"refused: it names {name}, which no checkpoint of the original needs. "
                              "Nothing was imported or run; do not load this file with other tools.")

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        if function not in _FUNCTIONS or not self._sensible(function, arguments):
            raise CheckpointError(f"refused: it calls {function} in a way that no checkpoint of the original does. "
                                  "Nothing was imported or run.")
        return {} if function == _ORDERED_DICT else Record(function, arguments)

    def new(self, cls: Global, arguments: tuple[Any, ...]) -> Record:
        if cls not in self._modules or arguments:
            raise CheckpointError(f"refused: it makes an object of {cls} in a way that no checkpoint of the original "
                                  "does. Nothing was imported or run.")
        return Record(cls, ())

    def persistent(self, identifier: Any) -> Any:
        match identifier:
            case ("module", Global() as cls, _, source) if cls in self._modules:
                self.source_characters += len(source) if type(source) is str else 0
                return cls
            case ("storage", Global() as kind, str(key), str(), int(elements), None) if (
                kind in _STORAGES and _is_count(elements)
            ):
                storage = Storage(key, _STORAGES[kind], elements)
                if self.storages.setdefault(key, storage) != storage:
                    raise CheckpointError("damaged: two descriptions of one storage.")
                return storage
        raise CheckpointError("refused: it refers to something outside of itself that is neither a tensor's content "
                              "nor a module of the original.")

    def _sensible(self, function: Global, arguments: tuple[Any, ...]) -> bool:
        """Whether the arguments of those functions are such as are written by pickling, where it matters."""
        match function, arguments:
            case Global("collections", "OrderedDict"), _:
                return arguments == ()
            case Global("__builtin__", "getattr"), (Record(made_by=cls), str(name)):
                return cls in self._modules and name.isidentifier() and not name.startswith("__")
            case Global("torch._utils", "_rebuild_parameter"), (Record(made_by=made_by), bool(), dict()):
                return made_by == _REBUILD_TENSOR
            case Global("torch._utils", "_rebuild_tensor_v2"), (Storage(), offset, tuple(size), tuple(stride), bool(),
                                                               dict()):
                return (_is_count(offset) and len(size) == len(stride) <= _MOST_DIMENSIONS
                        and all(_is_count(length) and length > 0 for length in size) and all(map(_is_count, stride)))
        return function not in (_GETATTR, _REBUILD_TENSOR, _REBUILD_PARAMETER)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48
