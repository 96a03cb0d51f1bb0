"""The command line: ``hflow-fast`` and ``python -m hflow_fast``. One file per command."""

from __future__ import annotations

from typing import Any

import click

from .._allocator import keep_freed_memory
from ..errors import CheckpointError, ConfigError, DatasetError
from .bench import bench
from .dataset import dataset
from .decode import decode
from .encode import encode
from .evaluate import evaluate
from .import_ import import_command
from .info import info
from .interpolate import interpolate
from .manipulate import manipulate
from .sample import sample
from .study import study
from .train import train

__all__ = ["main"]


class _UserError(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    """Shows what a user can cause as one line instead of a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise  # the reader has gone, as in `hflow-fast info | head`; click ends quietly
        except (CheckpointError, ConfigError, DatasetError, ArithmeticError, OSError) as error:
            raise _UserError("; ".join(str(error).splitlines())) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="hflow_fast")
@click.pass_context
def main(context: click.Context) -> None:
    """Hierarchical normalizing flows: datasets, training, what a trained model is used for, timings."""
    if context.invoked_subcommand != bench.name:  # which times operations in a program that has set nothing
        keep_freed_memory()


for _command in (bench, dataset, decode, encode, evaluate, import_command, info, interpolate, manipulate,
                 sample, study, train):
    main.add_command(_command)
