// actnorm on CUDA tensors: checks, allocation, device guard, current stream. The kernels are in actnorm.cuh.
#include "cuda/actnorm.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"
#include "common/tensor.h"
#include "cuda/tensor.cuh"

namespace hflow {
namespace {

struct Inputs {
  MemoryFormat format;
  Tensor x, log_scale, bias;  // x dense in `format`; the others contiguous, in the compute type
  cuda::ChannelShape shape;

  Inputs(const Tensor& x, const Tensor& log_scale, const Tensor& bias) : format(format_of(x)) {
    check_flow_variable("actnorm", "x", x);
    check_floating("actnorm", "log_scale", log_scale);
    check_floating("actnorm", "bias", bias);
    check_shape("actnorm", "log_scale", log_scale, {x.size(1)});
    check_shape("actnorm", "bias", bias, {x.size(1)});
    check_same_device("actnorm", "log_scale", log_scale, x);
    check_same_device("actnorm", "bias", bias, x);
    this->x = as_format(x, format);
    this->log_scale = cuda::as_type(log_scale, compute_type(x.scalar_type()));
    this->bias = cuda::as_type(bias, compute_type(x.scalar_type()));
    const int64_t pixels = pixels_of(x);
    shape = {x.size(0), x.size(1), pixels, format == MemoryFormat::Contiguous && pixels > 1};
  }
};

std::tuple<Tensor, Tensor> actnorm_fwd(Tensor x, Tensor log_scale, Tensor bias, bool inverse) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Inputs in(x, log_scale, bias);
  Tensor y = empty_in(in.x, in.format);
  Tensor log_det = empty(in.x, {in.shape.samples}, compute_type(in.x.scalar_type()));
  cuda::visit_types(in.x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    cuda::check(cuda::actnorm_forward(cuda::data<S>(in.x), cuda::data<T>(in.log_scale), cuda::data<T>(in.bias),
                                      cuda::data<S>(y), cuda::data<T>(log_det), in.shape, inverse,
                                      cuda::current_stream(in.x)));
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor> actnorm_bwd(Tensor x, Tensor log_scale, Tensor bias, Tensor grad_y,
                                               Tensor grad_log_det, bool inverse) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Inputs in(x, log_scale, bias);
  check_gradients("actnorm", grad_y, grad_log_det, x);
  check_same_device("actnorm", "grad_y", grad_y, x);
  check_same_device("actnorm", "grad_log_det", grad_log_det, x);
  grad_y = cuda::as_type(grad_y, x.scalar_type(), in.format);
  grad_log_det = cuda::as_type(grad_log_det, compute_type(x.scalar_type()));
  Tensor grad_x = empty_in(in.x, in.format);
  Tensor grad_log_scale = empty_in(in.log_scale, MemoryFormat::Contiguous),
         grad_bias = empty_in(in.bias, MemoryFormat::Contiguous);
  cuda::visit_types(x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const bool is_aligned =
        cuda::aligned(in.x.data_ptr()) && cuda::aligned(grad_y.data_ptr()) && cuda::aligned(grad_x.data_ptr());
    Tensor partial = empty(in.x, {cuda::actnorm_partial_size<S>(in.shape, is_aligned)}, compute_type(x.scalar_type()));
    cuda::check(cuda::actnorm_backward(cuda::data<S>(in.x), cuda::data<T>(in.log_scale), cuda::data<T>(in.bias),
                                       cuda::data<S>(grad_y), cuda::data<T>(grad_log_det), cuda::data<S>(grad_x),
                                       cuda::data<T>(grad_log_scale), cuda::data<T>(grad_bias), cuda::data<T>(partial),
                                       in.shape, inverse, cuda::current_stream(in.x)));
  });
  return {grad_x, cuda::as_type(grad_log_scale, log_scale.scalar_type()), cuda::as_type(grad_bias, bias.scalar_type())};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) {
  m.impl("actnorm_fwd", TORCH_BOX(&hflow::actnorm_fwd));
  m.impl("actnorm_bwd", TORCH_BOX(&hflow::actnorm_bwd));
}
