#!/usr/bin/env bash
# Everything that wants a GPU, in one command and about 10 minutes, what matters most first: build with CUDA, the tests
# marked cuda, training and sampling beside the original, C++ tests, op timings, and last, for as long as it takes,
# compute-sanitizer.
#   benchmarks/gpu.sh [FOLDER]     FOLDER defaults to $OUT, then to runs/gpu; every step leaves its log there
# ORIGINAL names a checkout of https://github.com/timoneh/hflow, absolute or seen from the repository's root; without
# one there is no comparison.
# Needs nvcc and a torch built with CUDA; PYTHON chooses the interpreter. Goes on after a failed step; the end tells.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(mkdir -p "${1:-${OUT:-runs/gpu}}" && cd "${1:-${OUT:-runs/gpu}}" && pwd)
failed=()
: > "$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND…
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  if [ "$status" = 0 ]; then
    say "ok      $name ($((SECONDS - begin)) s)"
  else
    say "FAILED  $name ($((SECONDS - begin)) s, exit $status): see $out/$name.log"
    tail -n 15 "$out/$name.log"
    failed+=("$name")
  fi
  return "$status"
}

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> "$out/device.log") || {
  echo "gpu.sh: $python sees no CUDA device through torch; see $out/device.log" >&2
  exit 1
}
missing=$("$python" -c 'from importlib.util import find_spec as found
print(*(name for name in "numpy PIL safetensors pydantic click tqdm pytest hypothesis".split() if not found(name)))')
if [ -n "$missing" ]; then
  echo "gpu.sh: $python lacks $missing; install what pyproject.toml names, or put it on PYTHONPATH" >&2
  exit 1
fi
architecture=${capability/./}
step versions 60 bash -c "nvidia-smi; nvcc --version; $python -m torch.utils.collect_env"
export HFLOW_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability
step build 300 "$python" setup.py build_ext --inplace || {
  say "without a build nothing else can run"
  exit 1
}

step pytest 240 "$python" -m pytest -q -m cuda python_tests

if [ -n "${ORIGINAL:-}" ]; then
  step vs-original 200 "$python" benchmarks/vs_original.py --original "$ORIGINAL" --device cuda --repeats 10 \
    --results "$out"
  step vs-original-fp32 100 "$python" benchmarks/vs_original.py --original "$ORIGINAL" --device cuda --repeats 5 \
    --precision fp32 --only training,sampling --modes prepared,graph --results "$out"
else
  say "skipped the comparison with the original: ORIGINAL does not name a checkout"
fi

# CTest where there is CMake; else the same tests by hand.
tests="$PWD/build/gpu-tests"
mkdir -p "$tests"
if command -v cmake > /dev/null; then
  step ctest 180 bash -c "cmake -S . -B '$tests' -DCMAKE_CUDA_ARCHITECTURES=$architecture && cmake --build '$tests' \
    --parallel $(nproc) && ctest --test-dir '$tests' --output-on-failure"
else
  step ctest 180 bash -c "set -e; printf '%s\n' cuda_tests/test_*.cu | xargs -P $(nproc) -I SOURCE bash -c \
    'nvcc -std=c++17 -O3 -arch=sm_$architecture -Icsrc SOURCE -o $tests/\$(basename SOURCE .cu)'; \
    for test in $tests/test_*; do \$test; done"
fi

step bench 240 "$python" -m hflow_fast bench --device cuda --repeats 15 --no-compile --bf16-raw --results "$out" \
  --plot "$out/ops.png" --markdown "$out/benchmarks.md"
step bench-compile 200 "$python" -m hflow_fast bench --device cuda --ops coupling,flow_step,glow_step --cases 4×3×128 \
  --results "$out/compile"

if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck; do
    for source in cuda_tests/test_*.cu; do
      name=$(basename "$source" .cu)
      binary=$tests/$name
      [ -x "$binary" ] || binary=$tests/${name/test_/cuda_}  # what CMake calls it
      step "$tool-$name" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 "$binary"
    done
  done
else
  say "skipped compute-sanitizer: it is not on PATH"
fi

if [ ${#failed[@]} -gt 0 ]; then
  say "failed: ${failed[*]}"
  exit 1
fi
say "all steps passed"
