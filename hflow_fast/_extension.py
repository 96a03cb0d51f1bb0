"""Loading of the compiled kernels, ``hflow_fast._C``, and what can be known about them.

The package works without them, slowly, on :mod:`hflow_fast.reference`; the first operation that has to says so once.
``HFLOW_FAST_EXTENSION=0`` in the environment asks for the reference.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

__all__ = ["build_info", "has_kernel", "missing_reason"]

_OPS = (
    "actnorm",
    "bias_act",
    "conv1x1",
    "coupling",
    "flow_step",
    "haar",
    "instance_norm",
    "lu",
    "lu_many",
    "resample",
)
_INNER_OPS = ("conv3x3",)
"""With kernels, but without a promise to users: what they may count on is in hflow_fast.ops."""
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def _load() -> tuple[dict[str, str], str | None]:
    """Import the extension: its build information, or why there is none."""
    if os.environ.get("HFLOW_FAST_EXTENSION", "1") == "0":
        return {}, "HFLOW_FAST_EXTENSION=0 is set"
    built = sorted(path.name for path in Path(__file__).parent.glob("_C*.so"))
    if not built:
        return {}, "the extension was not built (no compiler at install time?)"
    try:
        from hflow_fast import _C
    except ImportError as error:
        return {}, f"{', '.join(built)} cannot be loaded ({error}); it was built for another Python or torch"
    absent = [op for op in (*_OPS, *_INNER_OPS) if not hasattr(torch.ops.hflow_fast, f"{op}_fwd")]
    if absent:
        return {}, f"{', '.join(built)} is older than this package: it lacks {', '.join(absent)}"
    return _C.build_info(), None


_BUILD_INFO, _MISSING = _load()
_KERNELS = frozenset(
    (op, device)
    for op in (*_OPS, *_INNER_OPS)
    for device, key in _DISPATCH_KEYS.items()
    if _MISSING is None and torch._C._dispatch_has_kernel_for_dispatch_key(f"hflow_fast::{op}_fwd", key)
)
_warned = False


def has_kernel(op: str, device: torch.device) -> bool:
    """Whether operation ``op`` has a compiled kernel for tensors on ``device``; without it the reference is used.

    Warns, once in a process, where the extension is missing altogether.
    """
    if (op, device.type) in _KERNELS:
        return True
    if _MISSING is not None:
        _warn_once()
    return False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"hflow_fast runs on its plain torch reference, which is correct but slow: {_MISSING}. "
            "To build the kernels, install again with a C++ compiler: pip install --no-build-isolation .",
            RuntimeWarning,
            stacklevel=4,
        )


def build_info() -> dict[str, str]:
    """What the loaded extension contains: compiler, vector widths and the selected one, CUDA architectures, commit.

    Empty where no extension is loaded; :func:`missing_reason` then says why.
    """
    return dict(_BUILD_INFO)


def missing_reason() -> str | None:
    """Why no extension is loaded, or ``None`` where one is."""
    return _MISSING
