"""Runs the command line in processes that SIGKILL ends at chosen moments.

For each line of its input, ``{"moment": …, "count": …, "arguments": [...]}``, it forks (importing PyTorch takes longer
than the runs) and prints the exit code. ``count`` is the how-manieth time that the moment comes; "never" runs to the
end. Losses are logged at every step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, NoReturn

import torch._dynamo  # noqa: F401  (what a run imports slowly is imported once, here; optimizers import this one)
from torch.utils import tensorboard  # noqa: F401

from hflow_fast import data, models  # noqa: F401
from hflow_fast.cli import main
from hflow_fast.training import checkpoint, session, trainer

_save_file, _replace, _clip_and_step = checkpoint.save_file, os.replace, trainer.clip_and_step


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be survived")


def in_a_step(*arguments: Any) -> Any:
    return die()


def in_the_middle_of_writing(tensors: Any, path: Path, **options: Any) -> None:
    _save_file(tensors, path, **options)
    os.truncate(path, path.stat().st_size // 2)
    die()


def before_the_new_one_takes_its_place(source: Path, target: Path) -> None:
    die()


def after_the_new_one_took_its_place(source: Path, target: Path) -> None:
    _replace(source, target)
    die()


def at(count: int, original: Callable[..., Any], deadly: Callable[..., Any],
       counts: Callable[..., bool] = lambda *arguments: True) -> Callable[..., Any]:
    calls = 0

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += counts(*arguments)
        return (deadly if calls == count else original)(*arguments, **options)

    return function


def is_latest(source: Path, target: Path) -> bool:
    return Path(target).name == "latest.safetensors"


def run(moment: str, count: int, arguments: list[str]) -> None:
    session._LOG_SECONDS = 0.0
    if moment == "in_a_step":
        trainer.clip_and_step = at(count, _clip_and_step, in_a_step)
    elif moment == "in_the_middle_of_writing":
        checkpoint.save_file = at(count, _save_file, in_the_middle_of_writing)
    elif moment != "never":
        os.replace = at(count, _replace, globals()[moment], is_latest)
    sys.stdout = sys.stderr
    main(arguments, prog_name="hflow-fast")


if __name__ == "__main__":
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
