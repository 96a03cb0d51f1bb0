"""Writes files in the original's format: from a state dict, as the original would, or around any pickle."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any, Mapping

import pytest
import torch
from torch import Tensor, nn

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
END = b"."
PROTOCOL_2 = b"\x80\x02"

# What stands in for the original's classes: their names are what matters to the reader. As the original's, they keep
# bound methods, NumPy scalars, sets and tensors among their attributes.
SOURCE = '''
import numpy
import torch

open({canary!r}, "w")


class MyConv(torch.nn.Module):
    """Holds the parameters of a leaf."""

    def __init__(self):
        super().__init__()
        self.gain, self.names, self.kernel = numpy.float64(1.4), {{"ä"}}, torch.ones(2).expand(3, 2)


class MultiStep(torch.nn.Module):
    """Holds everything else."""

    def __init__(self):
        super().__init__()
        self.resolutions, self.function = [4, 2], self.interpolate

    def interpolate(self):
        """Kept as an attribute, as the original does with some of its methods."""
'''


def dumps(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


def value(plain: Any) -> bytes:
    """The opcodes of a plain value, to stand within a program."""
    return dumps(plain)[len(PROTOCOL_2):-len(END)]


def program(*opcodes: bytes) -> bytes:
    """A pickle of these opcodes."""
    return PROTOCOL_2 + b"".join(opcodes) + END


def call(name: str, *arguments: Any) -> bytes:
    """A pickle that calls the function of this name."""
    module, _, attribute = name.rpartition(".")
    return program(f"c{module}\n{attribute}\n".encode(), value(arguments), b"R")


def container(pickled: bytes, keys: list[str] | None = None, storages: bytes = b"") -> bytes:
    """A legacy container around a pickle."""
    return dumps(MAGIC) + dumps(1001) + dumps(SYSTEM) + pickled + dumps(keys or []) + storages


EMPTY_OPTIMIZER = container(dumps({"state": {}, "param_groups": []}))


def length(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little")


def checkpoint(network: bytes, settings: Any = None, optimizer: bytes = EMPTY_OPTIMIZER, source: bytes = b"") -> bytes:
    """A checkpoint file around two containers."""
    name = b"hflow.network"
    end = b"" if settings is None else settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    return (length(name) + name + length(source) + source + network + optimizer
            + (length(end) + end if settings is not None else b""))


def around(pickled: bytes, **parts: Any) -> bytes:
    """A checkpoint whose network is this pickle."""
    return checkpoint(container(pickled), **parts)


def as_original(weights: Mapping[str, Tensor], settings: Any, folder: Path, canary: Path,
                location: str = "cpu") -> bytes:
    """What the original writes for a network with these weights: whole modules with their classes' source text.

    Args:
        folder: an empty one; the classes are imported from there, and forgotten.
        canary: a file that the source text makes when it is run.
        location: tag of the storages' device.
    """
    source = SOURCE.format(canary=str(canary))
    (folder / "hflow").mkdir()
    (folder / "hflow" / "network.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(torch.serialization, "location_tag", lambda storage: location)
        importlib.invalidate_caches()
        network = _modules(importlib.import_module("hflow.network"), weights)
        data = checkpoint(_save(network), settings, _save(_adam(network)), source.encode())
    for name in ("hflow.network", "hflow"):
        del sys.modules[name]
    canary.unlink()
    return data


def _adam(network: nn.Module) -> dict[str, Any]:
    """What Adam's ``state_dict`` would give after a step."""
    parameters = list(network.parameters())
    state = {index: {"step": torch.tensor(1.0), "exp_avg": torch.ones_like(parameter, requires_grad=False),
                     "exp_avg_sq": torch.ones_like(parameter, requires_grad=False)}
             for index, parameter in enumerate(parameters)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False,
             "initial_lr": 1e-3, "foreach": None, "params": list(range(len(parameters)))}
    return {"state": state, "param_groups": [group]}


def _save(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _modules(classes: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    root = classes.MultiStep()
    for name, tensor in weights.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, classes.MyConv())
            module = module._modules[part]
        if leaf.startswith("interp_K"):
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor))
    return root
