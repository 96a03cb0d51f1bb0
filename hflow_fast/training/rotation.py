"""Which checkpoints a run keeps.

``latest.safetensors`` is replaced at every save. ``step_XXXXXXXX.safetensors`` are the last saves, the newest one among
them, and ``best.safetensors`` is the one with the fewest held-out bits/dim: further names of files that were once the
latest, so that they cost no disk space of their own while they are. The only files that training ever deletes are
``step_*`` ones when there are more of them than it was asked to keep.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from .._files import replacing
from ..errors import CheckpointError

__all__ = ["BEST", "LATEST", "checkpoint_files", "keep_checkpoint"]

LATEST = "latest.safetensors"
BEST = "best.safetensors"


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints that a run can go on from, the latest first; empty if there is none."""
    latest = folder / LATEST
    return [*([latest] if latest.is_file() else []), *sorted(_steps(folder), key=_steps(folder).get, reverse=True)]


def keep_checkpoint(folder: Path, step: int, count: int | None, *, best: bool) -> None:
    """Gives ``latest.safetensors`` its further names and deletes the oldest ``step_*`` beyond ``count``.

    Checkpoints of later steps, which are there when training has gone back, are left alone.

    Args:
        folder: the run's ``checkpoints``.
        step: of the latest checkpoint.
        count: ``step_*`` files to keep; None or 0: all.
        best: whether it is the best one so far.

    Raises:
        CheckpointError: a file cannot be named or deleted; the latest checkpoint itself is whole.
    """
    latest = folder / LATEST
    try:
        for name in (f"step_{step:08d}.safetensors", *([BEST] if best else [])):
            _name(latest, folder / name)
        if count:
            numbers = _steps(folder)
            for path in sorted((path for path in numbers if numbers[path] <= step), key=numbers.get)[:-count]:
                path.unlink()
    except OSError as error:
        raise CheckpointError(f"{latest}: saved, but those beside it are not up to date ({error}).") from error


def _name(file: Path, name: Path) -> None:
    """Makes ``name`` another name of ``file``, in one step; a copy where the file system has no hard links."""
    if name.exists() and name.samefile(file):
        return  # POSIX renames between two names of one file by doing nothing, which would leave the temporary one
    with replacing(name) as temporary:
        temporary.unlink(missing_ok=True)  # of a session that was killed here
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)


def _steps(folder: Path) -> dict[Path, int]:
    matches = ((path, re.fullmatch(r"step_(\d+)\.safetensors", path.name)) for path in folder.glob("step_*"))
    return {path: int(match[1]) for path, match in matches if match}
