"""Rules that every CUDA source keeps, read off the text: what neither a compiler nor the emulator would notice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))
OPS = sorted(path.stem for path in SOURCES if path.suffix == ".cu")

FORBIDDEN = {
    r"\batomic(?!_)\w+\(": "an atomic: sums must have the same bits from run to run",
    r"\bcuda(Malloc|Free|Memcpy|Memset|\w*Synchronize)\w*\(": "an allocation, copy or synchronisation: not capturable",
    r"__shared__(?! SharedArray<| uint4 dynamic_shared_memory)": "shared memory that the emulator cannot check",
    r"<<<(?!.*shape\.shared_bytes, stream)": "a launch past launch()",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_keeps_the_rules(path):
    text = path.read_text()
    assert text.startswith("// "), "a kernel file opens with thread mapping, bytes moved, why"
    code = re.sub(r"//.*", "", text)
    for pattern, why in FORBIDDEN.items():
        assert not re.search(pattern, code), f"{path.name} has {why}"
    if path.suffix == ".cuh" and path.name != "tensor.cuh":
        assert "torch/" not in code, f"{path.name} must compile without torch"


@pytest.mark.parametrize("op", OPS)
def test_has_all_its_rooms(op):
    for room in (f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cuh", f"cuda_tests/test_{op}.cu", f"hflow_fast/ops/{op}.py"):
        assert (ROOT / room).exists(), f"{op} has no {room}"


def test_rules_can_be_broken():
    broken = ["atomicAdd(&x, 1);", "cudaDeviceSynchronize();", "__shared__ float x[4];", "kernel<<<1, 2>>>(x);"]
    for pattern, text in zip(FORBIDDEN, broken, strict=True):
        assert re.search(pattern, text)
