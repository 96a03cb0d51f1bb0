"""A folder that appears when it is complete, made by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from ..errors import DatasetError

__all__ = ["building"]

_OURS = {"images.npy", "labels.npy", "dataset.json"}


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A temporary sibling of ``out`` that takes its name on success and is removed on failure.

    Where ``out`` has come to exist, or the body has made nothing, it is left as it is. A lock that ends with its process,
    however that ends, keeps others away; whoever holds it may remove what a killed process left.

    Raises:
        DatasetError: another process is at it, or the place cannot be written.
    """
    temporary = out.parent / f".{out.name}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _remove_remains(temporary)
            temporary.mkdir()
            try:
                yield temporary
                if any(temporary.iterdir()):
                    temporary.rename(out)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DatasetError(f"{out}: cannot be written ({error.strerror or error}); nothing is left behind. "
                           "Check the free space and the permissions there.") from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    path = out.parent / f".{out.name}.lock"
    while True:
        file = open(path, "a+")
        try:
            _take(file.fileno(), out, path)
            if _is_still_there(file.fileno(), path):
                break
        except BaseException:
            file.close()
            raise
        file.close()  # its holder finished, and removed the file, after it was opened here
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is locked, so that nobody can take a lock that others do not see


def _take(descriptor: int, out: Path, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text(errors="replace").strip() if path.exists() else ""
        raise DatasetError(f"{out}: is being made by {holder or 'another process'}; "
                           "wait for it, or choose another place.") from None
    except OSError as error:
        raise DatasetError(f"{out}: the file system there has no file locks ({error.strerror}); "
                           "make the dataset on a local disk and move it.") from error


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_remains(temporary: Path) -> None:
    """Removes what a killed process left of the temporary folder, and nothing that it cannot have made."""
    if not os.path.lexists(temporary):
        return
    if temporary.is_symlink() or not temporary.is_dir() or not {path.name for path in temporary.iterdir()} <= _OURS:
        raise DatasetError(f"{temporary}: exists and was not left by hflow-fast dataset; move it away.")
    shutil.rmtree(temporary)
