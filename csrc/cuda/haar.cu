// haar on CUDA tensors: checks, allocation, device guard, current stream. The kernels are in haar.cuh.
#include "cuda/haar.cuh"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/haar_shape.h"
#include "common/tensor.h"
#include "cuda/tensor.cuh"

namespace hflow {
namespace {

// Levels that one launch transforms.
Tensor transform(const Tensor& x, MemoryFormat format, int64_t levels, bool by_colour, double gain,
                 double average_gain, bool inverse) {
  Tensor y = empty_in(x, haar_shape(x, levels, inverse), format);
  const Tensor &image = inverse ? y : x, &bands = inverse ? x : y;
  cuda::HaarShape shape{static_cast<int>(x.dim() - 2), static_cast<int>(levels), x.size(0), image.size(1), {},
                        format == MemoryFormat::ChannelsLast};
  for (int axis = 0; axis < shape.dims; ++axis) shape.blocks[axis] = bands.size(2 + axis);
  cuda::visit_types(x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    cuda::check(cuda::haar<S, T>(cuda::data<S>(x), cuda::data<S>(y), shape, by_colour, gain, average_gain, inverse,
                                 cuda::current_stream(x)));
  });
  return y;
}

Tensor haar_fwd(Tensor x, int64_t levels, bool by_colour, double gain, double average_gain, bool inverse) {
  haar_shape(x, levels, inverse);  // its checks
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType type = x.scalar_type();
  const MemoryFormat format = format_of(x);
  const int64_t most = cuda::haar_levels(static_cast<int>(x.dim() - 2));
  x = as_format(x, format);
  if (levels <= most) return transform(x, format, levels, by_colour, gain, average_gain, inverse);
  // Level by level is how the transform is defined, so that more levels take more launches; rounded once nevertheless.
  x = as_format(torch::stable::to(x, compute_type(type)), format);
  for (int64_t rest = levels; rest > 0; rest -= most)
    x = transform(x, format, std::min(rest, most), by_colour, gain, average_gain, inverse);
  return as_format(torch::stable::to(x, type), format);
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) { m.impl("haar_fwd", TORCH_BOX(&hflow::haar_fwd)); }
