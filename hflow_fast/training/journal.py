"""What happened in a run, in words: ``log.txt``, and the same lines on the console."""

from __future__ import annotations

import logging
import platform
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from tqdm import tqdm

from .. import __version__

__all__ = ["describe_session", "journal"]

_LOGGER = logging.getLogger(__package__)  # the parent of the loggers of this package's modules


@contextmanager
def journal(path: Path | None) -> Iterator[None]:
    """Within it, what this package logs is appended to ``path``, if there is one, and goes to the console.

    Details (debug) and errors go to the file only: an error ends the session as an exception, which the console shows
    anyway.
    """
    handlers: list[logging.Handler] = [_Console()]
    if path is not None:
        handlers.append(_File(path))
    previous = _LOGGER.level
    _LOGGER.setLevel(logging.DEBUG if path is not None else logging.WARNING)
    for handler in handlers:
        _LOGGER.addHandler(handler)
    try:
        yield
    finally:
        _LOGGER.setLevel(previous)
        for handler in handlers:
            _LOGGER.removeHandler(handler)
            handler.close()


def describe_session(device: torch.device) -> str:
    """Versions, device and command line, for the log."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return (f"hflow_fast {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
            f"{device} ({name}), on {platform.node()}: {shlex.join(sys.argv)}")


class _Console(logging.Handler):
    """Beside the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            tqdm.write(f"WARNING: {record.getMessage()}", file=sys.stderr)
        elif record.levelno == logging.INFO:
            tqdm.write(record.getMessage())


class _File(logging.Handler):
    """Opened anew for each line, so that what a full disk refuses is not held back until the end, and lost there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(self.format(record) + "\n")
        except OSError as error:
            tqdm.write(f"WARNING: {self._path} could not be written ({error}); training goes on.", file=sys.stderr)
