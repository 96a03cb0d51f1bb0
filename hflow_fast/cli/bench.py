"""``hflow-fast bench``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .options import device_option, threads_option

__all__ = ["bench"]


@click.command()
@click.option("--ops", "selected", multiple=True, metavar="OP",
              help="Time this operation only; can be repeated, or given a list: coupling,lu.  [default: all]")
@click.option("--cases", "containing", default="", help="Time the cases with this in their name only: Glow, 4×3×128.",
              show_default=False)
@click.option("--repeats", type=click.IntRange(min=0), default=30,
              help="Times each side is taken in turn; 0 times nothing and reports what the results hold.")
@click.option("--compile/--no-compile", default=True, help="Time torch.compile too, which takes minutes to compile.")
@click.option("--bf16-raw", is_flag=True, help="Time a bfloat16 network output beside a float32 flow variable too.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("benchmarks/results"),
              help="Folder of CSV files that results are appended to.")
@click.option("--dry-run", is_flag=True, help="Append nothing.")
@click.option("--plot", type=click.Path(path_type=Path), is_flag=False, flag_value=Path("docs/images/ops.png"),
              help="Draw the newest results into this picture.  [without a value: docs/images/ops.png]")
@click.option("--markdown", type=click.Path(path_type=Path), is_flag=False, flag_value=Path("docs/benchmarks.md"),
              help="Write the newest results into this page.  [without a value: docs/benchmarks.md]")
@device_option
@threads_option
def bench(
    selected: tuple[str, ...], containing: str, repeats: int, compile: bool, bf16_raw: bool, results: Path,
    dry_run: bool, plot: Path | None, markdown: Path | None, device: str,
) -> None:
    """Time the operations beside plain torch, torch.compile and a copy of as many bytes.

    \b
    hflow-fast bench --ops coupling,lu --threads 2
    hflow-fast bench --repeats 0 --plot --markdown
    """
    import torch
    from tqdm import tqdm

    from .. import bench as library

    names = [name for given in selected for name in given.split(",")] or list(library.OPS)
    for name in names:
        if name not in library.OPS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(library.OPS)}", param_hint="--ops")
    rows = []
    if repeats:
        place = torch.device(device)
        cases = list(library.cases_of(names, place, bf16_raw=bf16_raw, containing=containing))
        if not cases:
            raise click.UsageError(f"nothing to time on {device}: no compiled kernel, or no case holds {containing!r}.")
        timer = library.Timer(place, repeats, compile)
        progress = tqdm(cases, unit="case", disable=None)
        for case in progress:
            progress.set_postfix_str(f"{case.op} {case.name}")
            timed = library.rows_of(timer.time(case), place)
            rows += timed
            if not dry_run:  # at once: an interrupted run keeps what it has
                _check(library.append_rows, timed, results)
        click.echo(f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}, "
                   f"large copy {timer.bandwidth:.1f} GB/s")
        click.echo(library.table(rows))
    if plot is None and markdown is None and repeats:
        return
    kept = library.newest_rows([*_check(library.read_rows, results), *(rows if dry_run else [])])
    if not repeats and plot is None and markdown is None:
        click.echo(library.table(kept))
    if plot is not None:
        _check(library.draw_plot, kept, plot)
        click.echo(f"wrote {plot}")
    if markdown is not None:
        page = _check(library.markdown, kept)
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(page)
        click.echo(f"wrote {markdown}")


def _check(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; what it finds wrong with the results becomes one line."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
