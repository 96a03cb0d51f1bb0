# Every target sets up what it needs and can be run again: finished set-up is not redone.
#   make test        all tests
#   make test-oldest the same on torch 2.11, the oldest that is supported; takes several GB in .venv-oldest
#   make demo        train a small model on real images: runs/demo/
#   make cuda-check  compile every CUDA kernel, without a GPU
#   make bench       our ops beside plain PyTorch and torch.compile: benchmarks/results, docs/benchmarks.md
#   make docs        the documentation as a site: docs/_build/html

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help test test-oldest demo cuda-check bench docs

PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
export MAX_JOBS ?= $(shell nproc)

help:
	@sed -n '2,7s/^# *//p' Makefile

# torch comes first: the extension is built against the installed one, and nothing later may replace it.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) setuptools wheel ninja pybind11
	touch $@

$(VENV)/install.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(shell find csrc -type f)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

# Where CMake is installed, C++ tests: the formulas, and every CUDA kernel in the block emulator.
# The tests' tensors are small: a process per core with one thread each is the fastest, on a busy machine by far.
test: $(VENV)/install.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest python_tests --numprocesses $(MAX_JOBS) --dist loadfile --durations=10
	if command -v cmake > /dev/null; then \
	  cmake -S . -B build/cmake && cmake --build build/cmake --parallel $(MAX_JOBS) && \
	  ctest --test-dir build/cmake --output-on-failure --parallel $(MAX_JOBS); \
	else echo "no cmake: the C++ tests were not run"; fi

# That torch comes with CUDA, of which these tests have no use.
test-oldest:
	HFLOW_FAST_CUDA=0 $(MAKE) test VENV=.venv-oldest TORCH=torch==2.11.0

demo: $(VENV)/install.stamp
	$(BIN)/python scripts/demo.py --run $(RUN)

cuda-check: $(VENV)/install.stamp
	$(BIN)/python scripts/cuda_check.py

bench: $(VENV)/install.stamp
	$(BIN)/python -m hflow_fast bench --device cpu --plot --markdown

docs: $(VENV)/install.stamp
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html
