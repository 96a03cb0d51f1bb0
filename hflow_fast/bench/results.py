"""Results as CSV files, one per operation, each row with what is needed to judge it later."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from .. import _extension
from .measure import QUANTILES, Timing

__all__ = ["COLUMNS", "append_rows", "device_name", "newest_rows", "provenance", "read_rows", "rows_of"]

Row = dict[str, str]

COLUMNS = (
    "op", "case", "work", "dtype", "method",
    *(f"{side}_us_q{q}" for side in ("ours", "eager", "compile", "copy") for q in QUANTILES),
    "ratio_eager", "ratio_compile", "bytes", "floor_us", "copy_gb_s", "notes",
    "device", "threads", "torch", "hflow_fast", "commit", "date",
)  # fmt: skip
_CASE = ("op", "case", "work", "dtype", "method")


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rows_of(timings: Iterable[Timing], device: torch.device) -> list[Row]:
    """Timings of this run on ``device`` as rows."""
    run = provenance(device)
    return [_row(timing) | run for timing in timings]


def provenance(device: torch.device) -> Row:
    """What is needed to judge numbers later: where, with what and when they were measured."""
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "hflow_fast": _version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _row(timing: Timing) -> Row:
    case, row = timing.case, dict.fromkeys(COLUMNS, "")
    row |= {"op": case.op, "case": case.name, "work": case.work, "dtype": case.dtype, "method": timing.method}
    for side, times in timing.sides.items():
        row |= {f"{side}_us_q{q}": f"{value:.2f}" for q, value in zip(QUANTILES, times)}
    for side in ("eager", "compile"):
        ratio = timing.ratio(side)
        row[f"ratio_{side}"] = "" if ratio is None else f"{ratio:.2f}"
    row |= {"bytes": str(case.bytes), "floor_us": f"{timing.floor:.2f}", "copy_gb_s": f"{timing.bandwidth:.1f}"}
    row["notes"] = "; ".join(f"{side} failed: {reason}" for side, reason in timing.notes.items())
    return row


def append_rows(rows: Sequence[Row], folder: Path) -> None:
    """Append to ``folder/<op>.csv``.

    Raises:
        ValueError: A file there has other columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(row["op"] for row in rows):
        path = folder / f"{op}.csv"
        new = not path.exists()
        if not new:
            _check_columns(path)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(row for row in rows if row["op"] == op)


def append_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Adds rows of equal columns to a file of their own, with a header if it is new, and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def read_rows(folder: Path) -> list[Row]:
    """All rows in ``folder``, oldest first within an operation.

    Raises:
        ValueError: A file there has other columns.
    """
    rows = []
    for path in sorted(folder.glob("*.csv")):
        _check_columns(path)
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def _check_columns(path: Path) -> None:
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if tuple(found) != COLUMNS:
        raise ValueError(f"{path}: not a file of hflow-fast bench: its columns must be {', '.join(COLUMNS)}")


def newest_rows(rows: Sequence[Row], device: str | None = None, threads: int | None = None) -> list[Row]:
    """The last row of every case, of one device and thread count: those of the newest row unless given."""
    if not rows:
        return []
    newest = max((row for row in rows if device in (None, row["device"])), key=lambda row: row["date"], default=None)
    if newest is None:
        return []
    where = (newest["device"], newest["threads"] if threads is None else str(threads))
    chosen = {tuple(row[c] for c in _CASE): row for row in rows if (row["device"], row["threads"]) == where}
    return list(chosen.values())


def _version() -> str:
    try:
        return metadata.version("hflow_fast")
    except metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """The commit of the working tree that is timed, "+" where it has changes; the build's where there is no git."""
    here = Path(__file__).parent
    try:
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True)
        if tracked.returncode:
            return _built_from()
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return _built_from()
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _built_from() -> str:
    return _extension.build_info().get("git_commit", "unknown")
