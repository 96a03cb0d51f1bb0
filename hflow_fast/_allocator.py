"""The memory of this process: what is left for tensors, and that what is freed stays at hand."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line sets the allocator before it has a need of torch
    import torch

__all__ = ["free_bytes", "keep_freed_memory"]

# <malloc.h>; the last two are where glibc's thresholds end up by themselves once large blocks have been freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_KEEP = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
_RETURN = {_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 64 * 2**20, _M_MMAP_THRESHOLD: 32 * 2**20}
_OWN_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def keep_freed_memory(keep: bool = True) -> bool:
    """Lets this process keep memory on the CPU that it has freed, for its next tensors.

    glibc returns every block of more than 32 MiB to the system when it is freed, and its next tensor of that size then
    waits for as many pages to be cleared: a fifth of the time of a training step with large batches
    (``docs/performance.md``). Kept, memory that the system counts as used stays at its peak.

    It is a setting of the whole process, which the commands of ``hflow-fast`` make for themselves and a program that
    uses the library makes where it likes to. A GPU's memory is PyTorch's affair.

    Args:
        keep: False goes back to returning it.

    Returns:
        Whether there was something to set: not where the C library is another, and not where ``MALLOC_MMAP_MAX_``,
        ``MALLOC_TRIM_THRESHOLD_`` and the like in the environment, or ``glibc.malloc`` in ``GLIBC_TUNABLES``, have
        decided already. An allocator that takes glibc's place (jemalloc, tcmalloc) goes its own way.

    Example:
        >>> import hflow_fast
        >>> is_set = hflow_fast.keep_freed_memory()
    """
    if any(name in os.environ for name in _OWN_SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([set_option(option, value) == 1 for option, value in (_KEEP if keep else _RETURN).items()])


def free_bytes(device: torch.device) -> int | None:
    """How much more this process can allocate, other processes being as they are now; None where nobody says.

    On a CPU the least of what the system and the cgroup have left, where this process is one of several that
    ``torchrun`` has started its share of that.
    """
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    left = [bytes_left for bytes_left in (_left_in_system(), _left_in_cgroup()) if bytes_left is not None]
    return min(left) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" and left else None


def _left_in_system() -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _left_in_cgroup() -> int | None:
    """Of version 2, as containers see their own: files that are cached do not count as used."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(statistics["inactive_file"]))
    except (OSError, KeyError, ValueError):
        return None
