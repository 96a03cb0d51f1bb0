// Launching a kernel in the emulator: stands in for csrc/cuda/launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hflow::cuda {

constexpr int kThreads = 256;

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;

  LaunchShape(int64_t blocks, int threads = kThreads, int shared_bytes = 0)
      : blocks(blocks), threads(threads), shared_bytes(shared_bytes) {}
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t, Arguments... arguments) {
  emulator::run_grid(shape.blocks, shape.threads, shape.shared_bytes,
                     [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

}  // namespace hflow::cuda
