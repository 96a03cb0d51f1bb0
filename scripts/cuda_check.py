"""Compile every CUDA kernel for every target architecture, without a GPU: registers, spills, vector accesses.

python scripts/cuda_check.py [--jobs 2] [--source csrc/cuda/actnorm.cu ...]

Prints one line per kernel and architecture; fails where a kernel does not compile, uses local memory (spills or a stack
frame), or has a vector width above 1 as a template argument of its grid but no 16-byte loads and stores (kernels that
choose the width at run time: no 16-byte loads). Finished results are kept in build/cuda-check and made again when a
source, a header, the flags or nvcc change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, CUDA_HOME, include_paths

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda-check"
ARCHITECTURES = ("80", "86", "90")
# What the build uses: torch's own flags (some switch operators of the half types off) and those of setup.py.
DEFINES = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
FLAGS = (*COMMON_NVCC_FLAGS, *DEFINES, "-std=c++17", "-O3", "-Xptxas", "-v")

WIDE_LOAD = re.compile(r"\bld\.global(?:\.nc)?(?:\.\w+)*\.v(?:4\.[a-z]32|2\.[a-z]64|8\.[a-z]16)\b")
WIDE_STORE = re.compile(r"\bst\.global(?:\.\w+)*\.v(?:4\.[a-z]32|2\.[a-z]64|8\.[a-z]16)\b")
WIDTH = re.compile(r"Grid<(\d+)[,>]")
BOTH_WIDTHS = re.compile(r"<Mix(?:Rows|Pixels),")  # kernels that choose between vectors and single elements themselves


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    local_bytes: int  # stack frame, spill stores and spill loads
    wide_loads: int
    wide_stores: int

    def problem(self) -> str | None:
        if self.local_bytes:
            return "uses local memory"
        width = WIDTH.search(self.name)
        if width and int(width[1]) > 1 and not (self.wide_loads and self.wide_stores):
            return f"has vectors of {width[1]} but no 16-byte accesses"
        if BOTH_WIDTHS.search(self.name) and not self.wide_loads:
            return "has no 16-byte loads"
        return None


class CompileError(Exception):
    pass


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))


def demangle(names: list[str]) -> list[str]:
    """Readable names without namespaces and parameters; the mangled ones where binutils is missing."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    output = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    noise = re.compile(r"\(int\)|\(bool\)|\bhflow::|\bcuda::|^void ")
    return [noise.sub("", line).partition("(")[0] for line in output.splitlines()]


def parse(ptxas: str, ptx: str, architecture: str) -> list[Kernel]:
    """The kernels of one compilation, from what ptxas reported and from the PTX it read."""
    bodies = {m[1]: m[2] for m in re.finditer(r"\.entry (\w+)\(.*?^\{(.*?)^\}", ptx, re.DOTALL | re.MULTILINE)}
    mangled, kernels = [], []
    for report in ptxas.split("Compiling entry function ")[1:]:
        name = report.split("'")[1]
        local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = re.search(r"Used (\d+) registers", report)
        if local is None or registers is None or name not in bodies:
            raise CompileError(f"nvcc's report on {name} has a format this script does not know:\n{report}")
        body = bodies[name]
        mangled.append(name)
        kernels.append(
            Kernel(
                name,
                architecture,
                int(registers[1]),
                sum(map(int, local.groups())),
                len(WIDE_LOAD.findall(body)),
                len(WIDE_STORE.findall(body)),
            )  # fmt: skip
        )
    return [kernel._replace(name=name) for kernel, name in zip(kernels, demangle(mangled), strict=True)]


def compile_one(nvcc: str, version: str, source: Path, architecture: str) -> list[Kernel]:
    command = [nvcc, "-c", *FLAGS, "-gencode", f"arch=compute_{architecture},code=sm_{architecture}", f"-I{CSRC}"]
    command += [f"-I{path}" for path in include_paths()]
    headers = sorted([*CSRC.glob("*.h"), *CSRC.glob("common/*.h"), *CSRC.glob("cuda/*.cuh")])
    digest = hashlib.sha256("\0".join([version, *command]).encode())
    for path in (source, *headers, Path(__file__)):
        digest.update(path.read_bytes())
    folder = CACHE / f"{source.stem}-sm_{architecture}"
    result = folder / f"{digest.hexdigest()[:16]}.json"
    if result.exists():
        return [Kernel(*fields) for fields in json.loads(result.read_text())]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command += ["--keep", "--keep-dir", str(folder), str(source), "-o", str(folder / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{source.name} does not compile for sm_{architecture}:\n{done.stderr or done.stdout}")
    kernels = parse(done.stderr + done.stdout, (folder / f"{source.stem}.ptx").read_text(), architecture)
    result.write_text(json.dumps(kernels))
    return kernels


def print_table(kernels: list[Kernel]) -> None:
    """One line per kernel; the registers for each architecture, and the worst of the rest."""
    by_name: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    width = max(map(len, by_name), default=6)
    columns = " ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    print(f"{'':<{width}}  registers        local  16-byte\n{'kernel':<{width}}  {columns}  bytes  loads stores")
    for name, group in sorted(by_name.items()):
        registers = " ".join(f"{kernel.registers:5}" for kernel in group)
        local, loads, stores = (f(kernel[i] for kernel in group) for f, i in ((max, 3), (min, 4), (min, 5)))
        problems = "; ".join(f"sm_{kernel.architecture} {kernel.problem()}" for kernel in group if kernel.problem())
        print(f"{name:<{width}}  {registers}  {local:5}  {loads:5} {stores:6}  {problems}".rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    parser.add_argument("--source", type=Path, nargs="+", help="instead of csrc/cuda/*.cu")
    arguments = parser.parse_args()
    sources = [path.resolve() for path in arguments.source or sorted((CSRC / "cuda").glob("*.cu"))]
    nvcc = find_nvcc()
    if nvcc is None:
        advice = "Install the CUDA toolkit (no GPU is needed) and put its bin on PATH, or set CUDA_HOME."
        print(f"cuda-check: nvcc was not found. {advice}", file=sys.stderr)
        return 1
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    tasks = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    try:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = pool.map(lambda task: compile_one(nvcc, version, *task), tasks)
            kernels = [kernel for result in results for kernel in result]
    except CompileError as error:
        print(f"cuda-check: {error}", file=sys.stderr)
        return 1
    print_table(kernels)
    failures = sum(kernel.problem() is not None for kernel in kernels)
    print(f"\n{len(sources)} source(s), {len(kernels)} kernels: " + (f"{failures} FAILED" if failures else "all good"))
    return 1 if failures or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
