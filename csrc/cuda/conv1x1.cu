// conv1x1 on CUDA tensors: checks, allocation, device guard, current stream. The kernels are in conv1x1.cuh.
#include "cuda/conv1x1.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"
#include "common/tensor.h"
#include "cuda/mix_inputs.h"

namespace hflow {
namespace {

Tensor conv1x1_fwd(Tensor x, Tensor weight, Tensor bias) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cuda::MixInputs in("conv1x1", x, weight, bias);
  Tensor y = empty_in(in.x, in.format);
  cuda::visit_types(in.x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    cuda::check(cuda::conv1x1_forward(cuda::data<S>(in.x), cuda::data<T>(in.weight), cuda::data<T>(in.bias),
                                      cuda::data<S>(y), in.shape, cuda::current_stream(in.x)));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv1x1_bwd(Tensor x, Tensor weight, Tensor bias, Tensor grad_y) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cuda::MixInputs in("conv1x1", x, weight, bias);
  check_floating("conv1x1", "grad_y", grad_y);
  check_like("conv1x1", "grad_y", grad_y, x, x.size(1));
  check_same_device("conv1x1", "grad_y", grad_y, x);
  grad_y = cuda::as_type(grad_y, x.scalar_type(), in.format);
  Tensor grad_x = empty_in(in.x, in.format);
  Tensor grad_weight = empty_in(in.weight, MemoryFormat::Contiguous),
         grad_bias = empty_in(in.bias, MemoryFormat::Contiguous);
  cuda::visit_types(x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    Tensor partial = empty(in.x, {cuda::conv1x1_partial_size<S>(in.shape)}, in.weight.scalar_type());
    cuda::check(cuda::conv1x1_backward(cuda::data<S>(in.x), cuda::data<T>(in.weight), cuda::data<S>(grad_y),
                                       cuda::data<S>(grad_x), cuda::data<T>(grad_weight), cuda::data<T>(grad_bias),
                                       cuda::data<T>(partial), in.shape, cuda::current_stream(in.x)));
  });
  return {grad_x, cuda::as_type(grad_weight, weight.scalar_type()), cuda::as_type(grad_bias, bias.scalar_type())};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) {
  m.impl("conv1x1_fwd", TORCH_BOX(&hflow::conv1x1_fwd));
  m.impl("conv1x1_bwd", TORCH_BOX(&hflow::conv1x1_bwd));
}
