"""No arguments crash the process, hang it, or fail without naming the operation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hflow_fast

TESTS = Path(__file__).parent.parent
PACKAGE = Path(hflow_fast.__file__).parent


def test_arguments_nobody_should_pass(tmp_path):
    last = tmp_path / "call.txt"
    command = [sys.executable, "-m", "ops._fuzz", "150", str(last)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    try:
        result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs: {last.read_text()}")
    assert result.returncode in (0, 1), f"killed the process: {last.read_text()}\n{result.stderr[-2000:]}"
    assert result.returncode == 0, result.stdout or result.stderr
