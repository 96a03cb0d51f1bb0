// resample on CUDA tensors: checks, allocation, device guard, current stream. The kernels are in resample.cuh.
#include "cuda/resample.cuh"

#include <torch/csrc/stable/library.h>

#include "common/resample_check.h"
#include "common/tensor.h"
#include "cuda/tensor.cuh"

namespace hflow {
namespace {

Tensor resample_fwd(Tensor x, bool up, bool adjoint) {
  const std::vector<int64_t> sizes = resampled_sizes(x, up, adjoint);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = format_of(x);
  x = as_format(x, format);
  Tensor y = empty_in(x, sizes, format);
  const Tensor& small = up != adjoint ? x : y;
  const bool last = format == MemoryFormat::ChannelsLast;
  const cuda::ResampleShape shape{last ? x.size(0) : x.size(0) * x.size(1), small.size(2), small.size(3),
                                  last ? x.size(1) : 1, up, adjoint};
  cuda::visit_types(x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    cuda::check(cuda::resample<S, T>(cuda::data<S>(x), cuda::data<S>(y), shape, cuda::current_stream(x)));
  });
  return y;
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) { m.impl("resample_fwd", TORCH_BOX(&hflow::resample_fwd)); }
