"""The branch-free functions of csrc/common/vector_math.h, compiled alone, in units in the last place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FUNCTIONS = {"exp": mpmath.exp, "log": mpmath.log, "log1p": mpmath.log1p, "tanh": mpmath.tanh, "atan": mpmath.atan}
DERIVED = {"tanh_derivative": lambda x: mpmath.sech(x) ** 2}

SOURCE = """
#include "common/isa.h"
#include "common/vector_math.h"
#define FUNCTION(name)                                                                       \\
  template <class T> struct Leaf_##name {                                                    \\
    HFLOW_LEAF void run(const T* x, T* y, int64_t n) {                                       \\
      for (int64_t i = 0; i < n; ++i) y[i] = hflow::math::name(x[i]);                        \\
    }                                                                                        \\
  };                                                                                         \\
  extern "C" void name##_float32(const float* x, float* y, int64_t n) {                      \\
    hflow::run_leaf<Leaf_##name<float>>(x, y, n);                                            \\
  }                                                                                          \\
  extern "C" void name##_float64(const double* x, double* y, int64_t n) {                    \\
    hflow::run_leaf<Leaf_##name<double>>(x, y, n);                                           \\
  }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("vector_math")
    names = [*FUNCTIONS, *DERIVED]
    (folder / "functions.cpp").write_text(SOURCE + "\n".join(f"FUNCTION({name})" for name in names))
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run(["c++", *flags, "functions.cpp", "-o", "functions.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "functions.so"))


def evaluate(library, name, x):
    y = np.empty_like(x)
    pointers = (ctypes.c_void_p(values.ctypes.data) for values in (x, y))
    getattr(library, f"{name}_{x.dtype.name}")(*pointers, ctypes.c_int64(x.size))
    return y


def points(name, dtype):
    """Values over the whole range of the function, dense near zero (or one) and at the ends."""
    random = np.random.default_rng(0)
    info = np.finfo(dtype)
    if name == "exp":
        high = float(np.log(info.max))
        x = np.concatenate(
            [random.uniform(np.log(info.tiny), high, 1500), random.normal(size=1500), [0, high * (1 - 1e-6)]]
        )
    elif name == "log":
        x = np.concatenate(
            [np.exp(random.uniform(-80, 80, 1500)), random.uniform(0.5, 2, 1500), [info.tiny, info.max, 1]]
        )
    elif name == "log1p":
        x = np.concatenate([random.uniform(0, 1, 1000), np.exp(random.uniform(-60, 0, 1000)), [0, 1]])
    else:
        x = np.concatenate(
            [random.normal(size=1500), np.exp(random.uniform(-30, 3, 1000)), -np.exp(random.uniform(-30, 3, 500)), [0]]
        )
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [*FUNCTIONS, *DERIVED])
def test_error_in_units_in_the_last_place(library, name, dtype):
    x = points(name, dtype)
    exact = [(FUNCTIONS | DERIVED)[name](mpmath.mpf(float(value))) for value in x]
    y = evaluate(library, name, x)
    unit = np.spacing(np.abs(np.array([float(value) for value in exact], dtype=dtype)))
    ulps = max(abs(float((mpmath.mpf(float(a)) - e) / float(u))) for a, e, u in zip(y, exact, unit))
    assert ulps <= (6 if name in DERIVED else 3), f"{ulps:.2f} ulp"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_the_range(library, dtype):
    with np.errstate(all="ignore"):
        x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, -1.0, 1e4, -1e4], dtype)
        for name in ("exp", "log", "tanh", "atan"):
            np.testing.assert_allclose(
                evaluate(library, name, x),
                getattr(np, {"atan": "arctan"}.get(name, name))(x),
                rtol=4 * np.finfo(dtype).eps,
            )
        subnormal = np.array([np.log(np.finfo(dtype).tiny) - 3], dtype)
        np.testing.assert_allclose(evaluate(library, "exp", subnormal), np.exp(subnormal), rtol=1e-5)
