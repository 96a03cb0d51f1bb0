// bias_act on CUDA tensors: checks, allocation, device guard, current stream. The kernels are in bias_act.cuh.
#include "cuda/bias_act.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/bias_act_check.h"
#include "common/tensor.h"
#include "cuda/tensor.cuh"

namespace hflow {
namespace {

// Dense in `format`, of x's dtype.
Tensor like_x(const Tensor& tensor, const Tensor& x, MemoryFormat format) {
  return as_format(
      tensor.scalar_type() == x.scalar_type() ? tensor : torch::stable::to(tensor, x.scalar_type()), format);
}

struct Inputs {
  MemoryFormat format;
  Tensor x, bias, residual;  // bias in the compute type, residual like x
  bool biased, merges;
  int64_t activation;
  double slope, gain;
  cuda::ChannelShape shape;

  Inputs(const Tensor& x, const Tensor& bias, const Tensor& residual, int64_t activation, double slope, double gain)
      : format(format_of(x)),
        x(as_format(x, format)),
        bias(cuda::as_type(bias, compute_type(x.scalar_type()))),
        residual(is_absent(residual) ? residual : like_x(residual, x, format)),
        biased(!is_absent(bias)),
        merges(!is_absent(residual)),
        activation(activation),
        slope(slope),
        gain(gain) {
    const int64_t pixels = pixels_of(x);
    shape = {x.size(0), x.size(1), pixels, format == MemoryFormat::Contiguous && pixels > 1};
  }

  template <class S, class T>
  cuda::BiasAct<S, T> op() const {
    return {cuda::data<S>(x), biased ? cuda::data<T>(bias) : nullptr, merges ? cuda::data<S>(residual) : nullptr,
            static_cast<Activation>(activation), static_cast<T>(slope), static_cast<T>(gain)};
  }
};

Tensor bias_act_fwd(Tensor x, Tensor bias, Tensor residual, int64_t activation, double slope, double gain) {
  check_bias_act(x, bias, residual, activation);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Inputs in(x, bias, residual, activation, slope, gain);
  Tensor y = empty_in(in.x, in.format);
  cuda::visit_types(x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    cuda::check(cuda::bias_act_forward(in.op<S, T>(), cuda::data<S>(y), in.shape, cuda::current_stream(x)));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bias_act_bwd(Tensor x, Tensor bias, Tensor residual, Tensor grad_y,
                                                int64_t activation, double slope, double gain) {
  check_bias_act(x, bias, residual, activation);
  check_floating("bias_act", "grad_y", grad_y);
  check_like("bias_act", "grad_y", grad_y, x, x.size(1));
  check_same_device("bias_act", "grad_y", grad_y, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Inputs in(x, bias, residual, activation, slope, gain);
  grad_y = like_x(grad_y, x, in.format);
  Tensor grad_x = empty_in(in.x, in.format), grad_bias = empty_in(in.bias, MemoryFormat::Contiguous);
  Tensor grad_residual = empty_in(in.residual, in.merges ? in.format : MemoryFormat::Contiguous);
  cuda::visit_types(x.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    S* merged = in.merges ? cuda::data<S>(grad_residual) : nullptr;
    const bool is_aligned = cuda::aligned(in.x.data_ptr()) && cuda::aligned(grad_y.data_ptr()) &&
                            cuda::aligned(grad_x.data_ptr()) && cuda::aligned(merged);
    const int64_t parts = in.biased ? cuda::channel_sums_size<S>(in.shape, is_aligned) : 0;
    Tensor partial = empty(in.x, {parts}, compute_type(x.scalar_type()));
    cuda::check(cuda::bias_act_backward(in.op<S, T>(), cuda::data<S>(grad_y), cuda::data<S>(grad_x), merged,
                                        in.biased ? cuda::data<T>(grad_bias) : nullptr, cuda::data<T>(partial),
                                        in.shape, cuda::current_stream(x)));
  });
  // Gradients have the dtypes of what they belong to.
  if (grad_residual.scalar_type() != residual.scalar_type())
    grad_residual = torch::stable::to(grad_residual, residual.scalar_type());
  return {grad_x, cuda::as_type(grad_bias, bias.scalar_type()), grad_residual};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) {
  m.impl("bias_act_fwd", TORCH_BOX(&hflow::bias_act_fwd));
  m.impl("bias_act_bwd", TORCH_BOX(&hflow::bias_act_bwd));
}
