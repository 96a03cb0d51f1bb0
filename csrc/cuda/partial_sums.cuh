// A log-det from the partial sums of its sample, the second stage of coupling and flow_step. Free of torch.
//
// One block per sample reads what the first stage's blocks wrote, in order and into double: the same bits from run to
// run. A few kilobytes in all, so its time is that of a launch.
#pragma once

#include "cuda/device.cuh"

namespace hflow::cuda {

template <class P, class T>
__global__ void __launch_bounds__(kThreads) partial_sums_kernel(const P* partial, int64_t parts, T* log_det) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) sum += static_cast<double>(partial[blockIdx.x * parts + i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) log_det[blockIdx.x] = static_cast<T>(sum);
}

// log_det[sample] = Σ partial[sample][parts]
template <class P, class T>
cudaError_t add_partial_sums(const P* partial, int64_t samples, int64_t parts, T* log_det, cudaStream_t stream) {
  return launch(partial_sums_kernel<P, T>, samples, stream, partial, parts, log_det);
}

}  // namespace hflow::cuda
