"""scripts/cuda_check.py finds what it is there to find."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "cuda_check.py"

PTXAS = """ptxas info    : Compiling entry function '{name}' for 'sm_86'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
"""
PTX = ".visible .entry {name}(\n.param .u64 x\n)\n.maxntid 256\n{{\n{body}\n}}\n"
WIDE = "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];\nst.global.v4.u32 [%rd2], {%r1, %r2, %r3, %r4};"
NARROW = "ld.global.nc.f32 %f1, [%rd1];\nst.global.v2.f32 [%rd2], {%f1, %f2};"
KERNEL = "_Z1kI4GridILi4EEEvPf"  # void k<Grid<4> >(float*)


@pytest.fixture(scope="module")
def cuda_check():
    spec = importlib.util.spec_from_file_location("cuda_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt, of binutils")
@pytest.mark.parametrize(
    ("stack", "spill", "body", "problem"),
    [
        (0, 0, WIDE, None),
        (0, 8, WIDE, "uses local memory"),
        (16, 0, WIDE, "uses local memory"),
        (0, 0, NARROW, "has vectors of 4 but no 16-byte accesses"),
        (0, 0, WIDE.replace("st.global.v4", "st.global"), "has vectors of 4 but no 16-byte accesses"),
    ],
)
def test_problems_are_found(cuda_check, stack, spill, body, problem):
    ptxas = PTXAS.format(name=KERNEL, stack=stack, spill=spill)
    (kernel,) = cuda_check.parse(ptxas, PTX.format(name=KERNEL, body=body), "86")
    assert (kernel.name, kernel.registers) == ("k<Grid<4> >", 40)
    assert kernel.problem() == problem


def test_a_report_it_cannot_read_is_an_error(cuda_check):
    with pytest.raises(cuda_check.CompileError, match="a format this script does not know"):
        cuda_check.parse(PTXAS.format(name=KERNEL, stack=0, spill=0), "", "86")


def test_says_that_nvcc_is_missing(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "CUDA_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "nvcc was not found. Install the CUDA toolkit" in done.stderr
    assert "Traceback" not in done.stderr
