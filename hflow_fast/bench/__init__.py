"""Times of every operation beside plain torch, torch.compile and a copy of as many bytes: ``hflow-fast bench``.

:mod:`cases <hflow_fast.bench.cases>` says what is timed, :mod:`measure <hflow_fast.bench.measure>` times it,
:mod:`results <hflow_fast.bench.results>` keeps it as CSV, :mod:`report <hflow_fast.bench.report>` shows it.
"""

from __future__ import annotations

from hflow_fast.bench.cases import OPS, Case, cases_of
from hflow_fast.bench.measure import Timer, Timing
from hflow_fast.bench.report import draw_plot, geometric_means, markdown, table
from hflow_fast.bench.results import append_rows, newest_rows, read_rows, rows_of

__all__ = [
    "OPS", "Case", "Timer", "Timing", "append_rows", "cases_of", "draw_plot", "geometric_means", "markdown",
    "newest_rows", "read_rows", "rows_of", "table",
]  # fmt: skip
