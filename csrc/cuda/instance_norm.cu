// instance_norm on CUDA tensors: checks, allocation, device guard, current stream. The kernels are in
// instance_norm.cuh.
#include "cuda/instance_norm.cuh"

#include <torch/csrc/stable/library.h>

#include "common/instance_norm_check.h"
#include "common/tensor.h"
#include "cuda/tensor.cuh"

namespace hflow {
namespace {

cuda::InstanceNormShape shape_in(const Tensor& x, MemoryFormat format) {
  const int64_t pixels = pixels_of(x);
  if (format == MemoryFormat::ChannelsLast) return {x.size(0), pixels, x.size(1), true};
  if (pixels == 1) return {x.size(0), x.size(1), 1, false};
  return {x.size(0) * x.size(1), pixels, 1, false};
}

Tensor instance_norm_fwd(Tensor x, double epsilon) {
  check_instance_norm(x, epsilon);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = format_of(x);
  x = as_format(x, format);
  Tensor y = empty_in(x, format);
  cuda::visit_types(x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    cuda::check(cuda::instance_norm_forward(cuda::data<S>(x), cuda::data<S>(y), static_cast<T>(epsilon),
                                            shape_in(x, format), cuda::current_stream(x)));
  });
  return y;
}

Tensor instance_norm_bwd(Tensor x, Tensor grad_y, double epsilon) {
  check_instance_norm(x, epsilon);
  check_floating("instance_norm", "grad_y", grad_y);
  check_like("instance_norm", "grad_y", grad_y, x, x.size(1));
  check_same_device("instance_norm", "grad_y", grad_y, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = format_of(x);
  x = as_format(x, format);
  if (grad_y.scalar_type() != x.scalar_type()) grad_y = torch::stable::to(grad_y, x.scalar_type());
  grad_y = as_format(grad_y, format);
  Tensor grad_x = empty_in(x, format);
  cuda::visit_types(x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    cuda::check(cuda::instance_norm_backward(cuda::data<S>(x), cuda::data<S>(grad_y), cuda::data<S>(grad_x),
                                             static_cast<T>(epsilon), shape_in(x, format), cuda::current_stream(x)));
  });
  return grad_x;
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) {
  m.impl("instance_norm_fwd", TORCH_BOX(&hflow::instance_norm_fwd));
  m.impl("instance_norm_bwd", TORCH_BOX(&hflow::instance_norm_bwd));
}
