// Launching a kernel. (The block emulator of cuda_tests has its own version of this file, since <<<>>> is not C++.)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hflow::cuda {

constexpr int kThreads = 256;  // per block, unless a kernel says otherwise: six such blocks fit on an SM of any target

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;  // of dynamic_shared()

  LaunchShape(int64_t blocks, int threads = kThreads, int shared_bytes = 0)
      : blocks(blocks), threads(threads), shared_bytes(shared_bytes) {}
};

// The only place that launches: no synchronisation, so every launch can be captured in a CUDA graph.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream, Arguments... arguments) {
  constexpr int kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, shape.shared_bytes, stream>>>(
      static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace hflow::cuda
