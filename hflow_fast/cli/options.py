"""Options that several commands share."""

from __future__ import annotations

from typing import Any, Callable

import click

__all__ = ["device_option", "threads_option"]


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    import torch

    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=value)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"{value!r} cannot be used here ({reason})") from None
    return value


def _threads(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    import torch

    if value is not None:
        torch.set_num_threads(value)


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--device``, given to the command as a usable device."""
    return click.option("--device", default="auto", callback=_device,
                        help="cpu, cuda, cuda:1 …; auto takes the GPU if there is one.")(command)


def threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--threads``, which takes effect at once and is not given to the command."""
    return click.option("--threads", type=click.IntRange(min=1), callback=_threads, expose_value=False,
                        help="CPU threads; on a busy machine, fewer than its processors.  "
                             "[default: PyTorch's choice]")(command)
