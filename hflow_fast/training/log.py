"""The numbers and pictures of a run: ``metrics.jsonl`` and, where it is installed, TensorBoard."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Mapping

from torch import Tensor

from .run import RunDirectory

__all__ = ["RunLog", "read_metrics"]

_LOGGER = logging.getLogger(__name__)


class RunLog:
    """Appends records of named numbers to a run.

    Args:
        run: where to.
        step: the step at which this session starts. Later records of an earlier session, which ended without
            saving them in a checkpoint, no longer count.
    """

    def __init__(self, run: RunDirectory, step: int) -> None:
        self._path = run.metrics
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._tensorboard = None
            _LOGGER.warning("TensorBoard is not installed (pip install 'hflow_fast[train]'); the metrics go to "
                            "metrics.jsonl only.")
        else:
            self._tensorboard = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            self._append("\n")  # the last line was torn by a full disk
        self.write(step, {})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one record.

        Raises:
            OSError: it cannot be written.
        """
        self._append(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def write_picture(self, step: int, name: str, picture: Tensor) -> None:
        """Shows a picture, (3, H, W) uint8, in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, picture, step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, text: str) -> None:
        try:
            with open(self._path, "a") as file:
                file.write(text)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error  # a full disk does not name the file


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` in the order of their steps.

    Where a resumed session went back to an earlier step, the records it took the place of are left out, and so is
    a line torn by a full disk.
    """
    records: list[dict[str, Any]] = []
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        records.append(record)
    return records
