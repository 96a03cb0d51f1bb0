"""Results for people: a table for the terminal, a page of Markdown, a plot. All from the rows of the CSV files."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .results import Row

__all__ = ["draw_plot", "fill", "geometric_means", "markdown", "table"]

_SIDES = {"eager": "plain torch", "compile": "torch.compile"}
_WORKS = ("forward", "forward + backward")


def table(rows: Sequence[Row]) -> str:
    """One line per row: ours in µs, and how many times the other sides take."""
    lines = [
        f"{'op':<13} {'case':<34} {'work':<18} {'method':<6} {'ours µs (20–80 %)':>26} {'eager':>7} {'compile':>7} "
        f"{'copy µs':>8} {'floor µs':>8}"
    ]
    for row in rows:
        ours = f"{float(row['ours_us_q50']):9.1f} ({row['ours_us_q20']}–{row['ours_us_q80']})"
        raw = " bf16 raw" if row["dtype"] != "float32" else ""
        lines.append(
            f"{row['op']:<13} {row['case'] + raw:<34} {row['work']:<18} {row['method']:<6} {ours:>26} "
            f"{_times(row, 'eager'):>7} {_times(row, 'compile'):>7} {row['copy_us_q50']:>8} {row['floor_us']:>8}"
        )
    lines.append("geometric means of the ratios (smallest to largest)")
    lines += [f"  {op:<13} {work:<18} {method:<6} " + "   ".join(f"{_SIDES[side]} {means[side]}" for side in means)
              for op, work, method, means in geometric_means(rows)]  # fmt: skip
    lines += [f"{r['op']} {r['case']} {r['work']} {r['method']}: {r['notes']}" for r in rows if r["notes"]]
    return "\n".join(lines)


def _times(row: Row, side: str) -> str:
    return f"{row[f'ratio_{side}']}×" if row[f"ratio_{side}"] else "–"


def geometric_means(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """(op, work, method, side → "mean× (smallest–largest)") of every operation, then of all together as op "all"."""
    groups = list(dict.fromkeys((row["op"], row["work"], row["method"]) for row in rows))
    groups += [("all", *rest) for rest in dict.fromkeys((work, method) for _, work, method in groups)]
    for op, work, method in groups:
        chosen = [r for r in rows if op in ("all", r["op"]) and (r["work"], r["method"]) == (work, method)]
        ratios = {side: [float(r[f"ratio_{side}"]) for r in chosen if r[f"ratio_{side}"]] for side in _SIDES}
        yield op, work, method, {side: _mean(values) for side, values in ratios.items() if values}


def _mean(ratios: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"


_PAGE = """# Benchmarks

Written by `hflow-fast bench --markdown` from the files in `benchmarks/results`, where all quantiles, versions and
commits are.

Every operation is timed in turn with plain torch doing the same (`hflow_fast.bench.plain`), with `torch.compile` of that,
and with a copy that reads and writes as many bytes as the operation must. Times are medians in µs per call, called from
Python unless marked "graph" (replayed from a CUDA graph); caches stay warm, so the copy of a small case is one within
the cache; *floor* is the time for those bytes at the bandwidth of a copy of 64 MiB. Ratios are how many times longer
the others take. Compiling is not counted.

{device}, {threads} threads, torch {torch}, {dates}. The large copy ran at {bandwidth} GB/s.
"""


def markdown(rows: Sequence[Row]) -> str:
    """A page with the geometric means, then every case."""
    if not rows:
        raise ValueError("there are no results to write a page from")
    dates, copies = sorted(row["date"][:10] for row in rows), [float(r["copy_gb_s"]) for r in rows if r["copy_gb_s"]]
    parts = [_PAGE.format(
        device=rows[0]["device"], threads=rows[0]["threads"], torch=rows[0]["torch"],
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
        bandwidth=f"{statistics.median(copies):.1f}" if copies else "an unmeasured number of",
    )]  # fmt: skip
    parts.append("## Geometric means of the ratios (smallest to largest)\n")
    lines = [("operation", "work", *_SIDES.values())]
    lines += [(op, _work(work, method), *(means.get(side, "–") for side in _SIDES))
              for op, work, method, means in geometric_means(rows)]  # fmt: skip
    parts += [_markdown_table(lines), "![operations](images/ops.png)\n"]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines = [("case", "work", "ours", *_SIDES.values(), "copy", "floor")]
        for row in (row for row in rows if row["op"] == op):
            sides = (f"{row[f'{s}_us_q50']} ({_times(row, s)})" if row[f"{s}_us_q50"] else "–" for s in _SIDES)
            case = row["case"] + (" bf16 raw" if row["dtype"] != "float32" else "")
            work = _work(row["work"], row["method"])
            lines.append((case, work, row["ours_us_q50"], *sides, row["copy_us_q50"] or "–", row["floor_us"] or "–"))
        parts += [f"## {op}\n", _markdown_table(lines)]
    notes = [f"- {row['op']}, {row['case']}, {row['work']}: {row['notes']}" for row in rows if row["notes"]]
    parts += ["## What could not be timed\n", *notes] if notes else []
    return "\n".join(parts).rstrip() + "\n"


def _work(work: str, method: str) -> str:
    return work if method == "eager" else f"{work}, {method}"


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    rows = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in rows) + "\n"


def fill(page: str, contents: Mapping[str, str]) -> str:
    """``page`` with what is between ``<!-- NAME -->`` and ``<!-- /NAME -->`` replaced.

    Raises:
        ValueError: The page has no such markers.
    """
    for name, text in contents.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page must have {begin} and {end} once each")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def draw_plot(rows: Sequence[Row], path: Path) -> None:
    """Draws ours, plain torch, torch.compile and the copy over the bytes that a case moves into ``path``."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    rows = [row for row in rows if row["bytes"]]
    if not rows:
        raise ValueError("there are no results to draw")
    operations = list(dict.fromkeys(row["op"] for row in rows))
    figure = Figure(figsize=(9, 2.6 * len(operations)), layout="constrained")
    axes = figure.subplots(len(operations), len(_WORKS), squeeze=False, sharex=True)
    sides = {"ours": "hflow_fast", **_SIDES, "copy": "copy of as many bytes"}
    for op, line in zip(operations, axes):
        for work, axis in zip(_WORKS, line):
            chosen = [row for row in rows if (row["op"], row["work"]) == (op, work)]
            chosen = [row for row in chosen if row["method"] == "graph"] or chosen
            for side, label in sides.items():
                points = sorted((int(r["bytes"]), *(float(r[f"{side}_us_q{q}"]) for q in (20, 50, 80)))
                                for r in chosen if r[f"{side}_us_q50"])  # fmt: skip
                if points:
                    size, low, middle, high = map(list, zip(*points))
                    spread = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
                    style = "--" if side == "copy" else "o"
                    axis.errorbar(size, middle, spread, fmt=style, markersize=3, linewidth=1, label=label)
            axis.set(xscale="log", yscale="log", title=f"{op}, {work}", ylabel="µs")
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("bytes that must move")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
