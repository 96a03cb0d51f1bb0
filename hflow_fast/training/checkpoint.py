"""Checkpoints: one safetensors file, replaced as a whole.

The file holds the tensors ``model.*``, ``average.*`` (the moving average) and, for resuming, ``training``: the
optimizer's moments, the data order and counters (of which all noise is a function) as bytes of ``torch.save``, read
back with ``weights_only=True``. Its metadata holds the configuration, a few notes, and a checksum of each of the three
parts. Nothing in it is ever executed, and nothing in it belongs to one of several processes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import replacing
from ..errors import CheckpointError
from .rotation import checkpoint_files

if TYPE_CHECKING:
    from ..models.precision import Precision

__all__ = ["Checkpoint", "load_initial_weights", "load_model", "load_weights", "read_checkpoint", "save_checkpoint"]

_FORMAT = "hflow_fast checkpoint"
_VERSION = 1  # raised when a file can no longer be read by the code before
_LOGGER = logging.getLogger(__name__)


class _Damaged(CheckpointError):
    """The file is torn or changed, so that another one may be better."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file says; parts that were not asked for or are not in the file are None."""

    path: Path
    config: dict[str, Any]
    notes: dict[str, Any]
    """Small facts, read without the parts: ``step`` and, where it was measured, ``held_out_bits_per_dim``."""
    model: dict[str, Tensor] | None
    average: dict[str, Tensor] | None
    training: dict[str, Any] | None


def save_checkpoint(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    model: nn.Module,
    average: nn.Module | None = None,
    training: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint beside ``path`` and then puts it in its place.

    Args:
        path: file to write or replace.
        config: what the model was built from.
        model: the model.
        average: the moving average of its parameters.
        training: nested dictionaries, lists, tensors and numbers; see ``Trainer.save``.
        notes: facts for :attr:`Checkpoint.notes`, JSON-ready.

    Raises:
        CheckpointError: the file cannot be written; a previous one is intact.
    """
    tensors = _prefixed("model", model)
    if average is not None:
        tensors |= _prefixed("average", average)
    if training is not None:
        buffer = io.BytesIO()
        torch.save(dict(training), buffer)
        tensors["training"] = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    metadata = {
        "format": _FORMAT, "version": str(_VERSION),
        "config": json.dumps(config), "notes": json.dumps(dict(notes or {})),
        "checksums": json.dumps({part: _checksum(part, tensors) for part in ("model", "average", "training")}),
    }
    try:
        with replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata=metadata)
            temporary.chmod(mode)  # safetensors makes files that nobody but their owner can read
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{os.fspath(path)}: not saved ({error}); the file was left as it was.") from error


def read_checkpoint(path: str | os.PathLike[str], *parts: str) -> Checkpoint:
    """Reads the configuration, the notes and the given parts of a checkpoint.

    Args:
        path: a checkpoint file, or a run directory, which stands for its latest checkpoint. Where that one is damaged,
            the one before takes its place, with a warning.
        parts: any of "model", "average" and "training".

    Raises:
        CheckpointError: the file is missing, damaged, of a newer version, or not a checkpoint.
    """
    path = Path(path)
    files = checkpoint_files(path / "checkpoints") if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise CheckpointError(f"{files[0] if files else path / 'checkpoints'}: no such file; give a checkpoint file or "
                              "the directory of a run that has saved one.")
    for file in files[:-1]:
        try:
            return _read(file, parts)
        except _Damaged as error:
            _LOGGER.warning("%s Going back to the checkpoint before it.", error)
    return _read(files[-1], parts)


def _read(path: Path, parts: tuple[str, ...]) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(metadata, path)
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.partition(".")[0] in parts}
        checksums = json.loads(metadata.get("checksums", "{}"))
        changed = [part for part in parts if part in checksums and checksums[part] != _checksum(part, tensors)]
        if changed:
            raise _Damaged(f"{path}: damaged (the checksum of its part {changed[0]} is wrong).")
        config, notes = json.loads(metadata["config"]), json.loads(metadata.get("notes", "{}"))
    except (KeyError, OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise _Damaged(f"{path}: damaged or not a checkpoint ({reason}).") from error
    training = _unpack(tensors.pop("training"), path) if "training" in tensors else None
    return Checkpoint(path, config, notes, _without_prefix("model", tensors), _without_prefix("average", tensors),
                      training)


def _check_version(metadata: Mapping[str, str], path: Path) -> None:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of hflow_fast.")
    version = metadata["version"]
    if not version.isdecimal():
        raise _Damaged(f"{path}: damaged (its format version is {version!r}).")
    if int(version) > _VERSION:
        raise CheckpointError(f"{path}: of format version {version}, made by a newer hflow_fast than this one, which "
                              f"reads versions up to {_VERSION}; update it (pip install -U hflow_fast).")


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads ``weights`` into ``module``.

    Raises:
        CheckpointError: names or shapes differ.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: does not fit the model of its configuration ({reason[:500]}).") from error


def load_model(
    path: str | os.PathLike[str], *, average: bool = True, device: torch.device | str = "cpu",
    precision: Precision | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint, ready for evaluation, and its configuration.

    Args:
        path: a checkpoint file, or a run directory.
        average: take the moving average of the parameters, if the checkpoint has one, instead of the last ones.
        device: where the model goes.
        precision: of its networks; see :meth:`hflow_fast.models.HFlow.set_precision`.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit its own configuration.
    """
    # The models are loaded only when one is needed: other commands start faster.
    from ..models.building import build_model

    checkpoint = read_checkpoint(path, "model", *(["average"] if average else []))
    model = build_model(checkpoint.config)
    load_weights(model, _weights(checkpoint), checkpoint.path)
    return model.to(device).set_precision(precision).eval(), checkpoint.config


def load_initial_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Gives ``model`` the weights of a checkpoint, the averaged ones where it has them, to train it further.

    Args:
        path: a checkpoint file, or a run directory.

    Raises:
        CheckpointError: the file is missing, damaged, or of another architecture.
    """
    checkpoint = read_checkpoint(path, "model", "average")
    try:
        model.load_state_dict(_weights(checkpoint))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path}: its model is another one than that to be trained; start from one of "
                              "equal MODEL and MODEL_PARAMETERS.") from error


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    weights = checkpoint.average or checkpoint.model
    if weights is None:
        raise CheckpointError(f"{checkpoint.path}: holds no model.")
    return weights


def _unpack(data: Tensor, path: Path) -> dict[str, Any]:
    try:
        return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise _Damaged(f"{path}: the state of its training is damaged or not plain data.") from error


def _checksum(part: str, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over the tensors of a part: safetensors itself notices a missing byte, but not a wrong one."""
    value = 0
    for name in sorted(name for name in tensors if name.partition(".")[0] == part):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return value


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    # safetensors wants tensors that are contiguous and share no memory, so each one is copied.
    return {f"{prefix}.{name}": value.detach().clone(memory_format=torch.contiguous_format).cpu()
            for name, value in module.state_dict().items()}


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    prefix += "."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)} or None
