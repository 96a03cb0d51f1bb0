"""Checkpoints: one safetensors file, replaced as a whole.

The file holds the tensors ``model.*``, ``average.*`` (the moving average) and, for resuming, ``training``: the
optimizer's moments, the data order, random states and counters as bytes of ``torch.save``, read back with
``weights_only=True``. Its metadata holds the configuration. Nothing in it is ever executed.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import replacing
from ..errors import CheckpointError

__all__ = ["Checkpoint", "load_model", "load_weights", "read_checkpoint", "save_checkpoint"]

_FORMAT = {"format": "hflow_fast checkpoint", "version": "1"}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file says; parts that were not asked for or are not in the file are None."""

    path: Path
    config: dict[str, Any]
    model: dict[str, Tensor] | None
    average: dict[str, Tensor] | None
    training: dict[str, Any] | None


def save_checkpoint(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    model: nn.Module,
    average: nn.Module | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint beside ``path`` and then puts it in its place.

    Args:
        path: file to write or replace.
        config: what the model was built from.
        model: the model.
        average: the moving average of its parameters.
        training: nested dictionaries, lists, tensors and numbers; see ``Trainer.state_dict``.

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
    try:
        with replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata=_FORMAT | {"config": json.dumps(config)})
            temporary.chmod(mode)  # safetensors makes files that nobody but their owner can read
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{os.fspath(path)}: not saved ({error}); the file was left as it was.") from error


def read_checkpoint(path: str | os.PathLike[str], *parts: str) -> Checkpoint:
    """Reads the configuration and the given parts of a checkpoint.

    Args:
        path: a checkpoint file, or a run directory, which stands for its latest checkpoint.
        parts: any of "model", "average" and "training".

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint.
    """
    path = _locate(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if {key: metadata.get(key) for key in _FORMAT} != _FORMAT:
                raise CheckpointError(f"{path}: not a checkpoint of this version of hflow_fast.")
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.partition(".")[0] in parts}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({error}).") from error
    training = _unpack(tensors.pop("training"), path) if "training" in tensors else None
    config = json.loads(metadata["config"])
    return Checkpoint(path, config, _without_prefix("model", tensors), _without_prefix("average", tensors), training)


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
    path: str | os.PathLike[str], *, average: bool = True, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint, ready for evaluation, and its configuration.

    Args:
        path: a checkpoint file, or a run directory.
        average: take the moving average of the parameters, if the checkpoint has one, instead of the last ones.
        device: where the model goes.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit its own configuration.
    """
    from ..models import HFlow  # the models are loaded only when one is needed: other commands start faster

    checkpoint = read_checkpoint(path, "model", *(["average"] if average else []))
    weights = checkpoint.average or checkpoint.model
    if weights is None:
        raise CheckpointError(f"{checkpoint.path}: holds no model.")
    model = HFlow.from_config(checkpoint.config)
    load_weights(model, weights, checkpoint.path)
    return model.to(device).eval(), checkpoint.config


def _locate(path: Path) -> Path:
    if path.is_dir():
        path = path / "checkpoints" / "latest.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a checkpoint file or the directory of a run "
                              "that has saved one.")
    return path


def _unpack(data: Tensor, path: Path) -> dict[str, Any]:
    try:
        return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"{path}: the state of its training is damaged or not plain data.") from error


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    # safetensors wants tensors that are contiguous and share no memory, so each one is copied.
    return {f"{prefix}.{name}": value.detach().clone(memory_format=torch.contiguous_format).cpu()
            for name, value in module.state_dict().items()}


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    prefix += "."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)} or None
