"""The directory of a training run."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping

from .._files import replacing
from ..configs import load_config
from ..errors import ConfigError
from .rotation import BEST, LATEST

__all__ = ["RunDirectory"]


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run.

    ``config.json``, ``log.txt``, ``metrics.jsonl``, ``samples/``, ``reconstructions/``, ``tb/``, and ``checkpoints/``,
    of which :mod:`.rotation` says what is in it.
    """

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunDirectory:
        """Makes the directory and writes its ``config.json``.

        Raises:
            ConfigError: the directory exists and is not empty.
        """
        run = cls(Path(path))
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise ConfigError(f"{run.path}: already exists; continue it with --resume or give a new run another name.")
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """An existing run.

        Raises:
            ConfigError: there is none.
        """
        run = cls(Path(path))
        if not run._config.is_file():
            raise ConfigError(f"{run.path}: no run to resume here (it has no config.json); "
                              "leave out --resume to start one.")
        return run

    @property
    def checkpoint(self) -> Path:
        """The latest one."""
        return self.path / "checkpoints" / LATEST

    @property
    def best(self) -> Path:
        """The checkpoint with the fewest held-out bits/dim."""
        return self.path / "checkpoints" / BEST

    @property
    def journal(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def reconstructions(self) -> Path:
        return self.path / "reconstructions"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    def make_folders(self) -> None:
        for directory in (self.checkpoint.parent, self.samples, self.reconstructions):
            directory.mkdir(exist_ok=True)

    def read_config(self) -> dict[str, Any]:
        return load_config(self._config)

    def write_config(self, config: Mapping[str, Any]) -> None:
        with replacing(self._config) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process from training in the same directory.

        Raises:
            ConfigError: one already does.
        """
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.path}: another process is training in this directory.") from None
            yield
