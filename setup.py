"""Builds ``hflow_fast._C``, a stable-ABI torch extension: one build loads on torch 2.11 and later.

Environment: HFLOW_FAST_CUDA=0|1 overrides the choice of CUDA, TORCH_CUDA_ARCH_LIST the architectures, CXX the compiler,
MAX_JOBS the number of compilations at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    raise SystemExit(
        f"hflow_fast builds against the torch it will run with, and the build cannot import it ({error}).\n"
        "Install torch 2.11 or later first, then build in the same environment:\n"
        "    pip install torch setuptools wheel ninja\n"
        "    pip install --no-build-isolation ."
    ) from None

ROOT = Path(__file__).resolve().parent  # older setuptools gives a relative path, and ninja runs elsewhere
TORCH_TARGET = "0x020b000000000000"  # 2.11
DEFAULT_CUDA_ARCHS = "8.0;8.6;9.0+PTX"  # an empty list crashes the build on a machine without a GPU


def say(text: str) -> None:
    print(f"hflow_fast: {text}", flush=True)


def compiler_problem() -> str | None:
    """Why no C++ extension can be built here, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH (install g++, or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')} (install the Python development headers)"
    return None


def wants_cuda() -> bool:
    """CUDA is built where torch has CUDA and nvcc exists; HFLOW_FAST_CUDA=0|1 overrides. Prints the decision."""
    home = cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))
    version = "none"
    if nvcc:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        version = output.partition("release ")[2].partition(",")[0] or "unknown"
    say(f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}; nvcc {version}")
    choice = os.environ.get("HFLOW_FAST_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"HFLOW_FAST_CUDA must be 0 or 1, got {choice!r}")
    possible = bool(torch.version.cuda and nvcc)
    if choice == "1" and not possible:
        missing = "nvcc" if torch.version.cuda else "a torch built with CUDA"
        raise SystemExit(f"HFLOW_FAST_CUDA=1, but {missing} was not found: install it, or unset HFLOW_FAST_CUDA")
    cuda = possible and choice != "0"
    say("building the CPU and CUDA kernels" if cuda else "building the CPU kernels only")
    return cuda


def write_build_stamp(cuda: bool) -> Path:
    """What build_info() reports, in a header of its own so that a new commit recompiles one file only."""
    git = (
        subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if shutil.which("git")
        else None
    )
    commit = git.stdout.strip() if git and git.returncode == 0 else "unknown"
    archs = os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else "none"
    text = (
        "#pragma once\n"
        f'#define HFLOW_GIT_COMMIT "{commit}"\n'
        f'#define HFLOW_CUDA_ARCHS "{archs}"\n'
        f'#define HFLOW_BUILD_TORCH "{torch.__version__}"\n'
    )
    header = ROOT / "build" / "generated" / "build_stamp.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return header.parent


def extension() -> list:
    problem = compiler_problem()
    if problem:
        say("*" * 80)
        say(f"NOT building the extension: {problem}.")
        say("The package will work, slowly, on its plain torch reference. Install again for speed.")
        say("*" * 80)
        return []
    cuda = wants_cuda()
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
    # No -march=native (the kernels choose their vector width at run time) and no -ffast-math (NaN must propagate).
    flags = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
        "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    ]  # fmt: skip
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp") + (glob("csrc/cuda/*.cu") if cuda else []))
    include_dirs = [str(ROOT / "csrc"), str(write_build_stamp(cuda))]
    if cuda:
        cuda_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA", "-O3"]
        compile_args = {"cxx": [*flags, "-DUSE_CUDA"], "nvcc": cuda_flags}
        return [cpp_extension.CUDAExtension(
            "hflow_fast._C", sources, include_dirs=include_dirs, extra_compile_args=compile_args
        )]  # fmt: skip
    return [cpp_extension.CppExtension(
        "hflow_fast._C", sources, include_dirs=include_dirs, extra_compile_args={"cxx": flags}
    )]  # fmt: skip


setup(ext_modules=extension(), cmdclass={"build_ext": cpp_extension.BuildExtension})
