"""The compiled extension itself: what it links, what it says about itself, and what happens without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hflow_fast
from hflow_fast._extension import build_info, has_kernel, missing_reason

PACKAGE = Path(hflow_fast.__file__).parent

USE = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from hflow_fast import _extension, ops, reference
    for _ in range(2):
        ops.actnorm(torch.ones(1, 2), torch.zeros(2), torch.zeros(2))
    {more}
ours = [str(w.message) for w in caught if "hflow_fast" in str(w.message)]
print(_extension.build_info().get("vector_selected"), ours)
"""
COMPARE = """
    torch.manual_seed(0)
    everything = [torch.randn(shape) for shape in ((2, 3, 17, 33), (2, 6, 17, 33), (3, 3), (3,))]
    for dtype, tolerance in ((torch.float32, {}), (torch.float64, {}), (torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2})):
        for options in ({"scale_map": "sigmoid_floor", "active": "checkerboard"}, {"scale_map": "atan"}):
            tensors = [t.to(dtype) for t in everything]
            spec = ops.CouplingSpec(**options)
            for a, b in zip(ops.flow_step(*tensors, spec), reference.flow_step(*tensors, spec)):
                torch.testing.assert_close(a, b, **tolerance)
"""


def use(more: str = "", folder: Path = PACKAGE.parent, **environment: str) -> str:
    """What USE prints in a fresh process that imports the package from ``folder``."""
    result = subprocess.run(
        [sys.executable, "-c", USE.replace("{more}", more.strip())],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_extension_is_built_with_every_cpu_kernel():
    assert missing_reason() is None
    ops = ("actnorm", "bias_act", "conv1x1", "coupling", "flow_step", "haar", "instance_norm", "lu", "resample")
    for op in ops:
        assert has_kernel(op, torch.device("cpu")), op
        assert not has_kernel(op, torch.device("meta")), op


def test_build_info_says_what_the_build_contains():
    info = build_info()
    assert set(info) == {
        "compiler", "vector_widths", "vector_selected", "cuda_archs", "torch_target", "torch_build", "git_commit"
    }  # fmt: skip
    assert info["vector_selected"] in info["vector_widths"].split(", ")
    assert info["torch_target"] == "2.11"


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_needs_no_cpp_symbol_of_torch():
    (library,) = PACKAGE.glob("_C*.so")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", library], capture_output=True, text=True, check=True
    ).stdout
    assert "torch_library_impl" in symbols
    assert [line for line in symbols.splitlines() if "at::" in line or "c10::" in line or "torch::" in line] == []


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_vector_width_is_right(isa):
    selected, _, warnings = use(COMPARE, HFLOW_FAST_ISA=isa).partition(" ")
    assert selected in (isa, "baseline") and warnings == "[]"


def test_can_be_switched_off_and_says_so_once():
    output = use(HFLOW_FAST_EXTENSION="0")
    assert output.startswith("None ['hflow_fast runs on its plain torch reference")
    assert "HFLOW_FAST_EXTENSION=0 is set" in output and output.count("reference") == 1


@pytest.mark.parametrize(
    ("content", "message"), [(b"not a library", "cannot be loaded"), (None, "the extension was not built")]
)
def test_works_with_a_broken_or_missing_library(tmp_path, content, message):
    shutil.copytree(PACKAGE, tmp_path / "hflow_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if content is not None:
        (tmp_path / "hflow_fast" / next(PACKAGE.glob("_C*.so")).name).write_bytes(content)
    output = use(folder=tmp_path)
    assert output.startswith("None ['hflow_fast runs on its plain torch reference") and message in output
