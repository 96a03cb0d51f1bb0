// flow_step on CUDA tensors: checks, allocation, device guard, current stream. The kernels are in flow_step.cuh.
#include "cuda/flow_step.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"
#include "common/coupling_checks.h"
#include "common/tensor.h"
#include "cuda/mix_inputs.h"

namespace hflow {
namespace {

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// x and raw as the kernels take them: of one dtype, or float32 beside a half type.
struct StepInputs {
  ScalarType type, raw_type;

  StepInputs(const Tensor& x, const Tensor& raw) : type(x.scalar_type()), raw_type(raw.scalar_type()) {
    if (is_half(type) && raw_type != type) type = ScalarType::Float;
    if (type == ScalarType::Double || !is_half(raw_type)) raw_type = type;
  }

  // f(S{}, R{}, T{})
  template <class F>
  void visit(const F& f) const {
    cuda::visit_types(type, [&](auto s, auto t) {
      if constexpr (std::is_same_v<decltype(s), float>) {
        if (raw_type == ScalarType::BFloat16) return f(s, __nv_bfloat16{}, t);
        if (raw_type == ScalarType::Half) return f(s, __half{}, t);
      }
      f(s, s, t);
    });
  }
};

std::tuple<Tensor, Tensor> flow_step_fwd(Tensor x, Tensor raw, Tensor weight, Tensor bias, int64_t scale_map,
                                         double clamp, double shift_clamp, int64_t layout, int64_t form, int64_t active,
                                         int64_t block, int64_t parity, bool inverse) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cuda::MixInputs in("flow_step", x, weight, bias);
  const CouplingOptions options =
      coupling_options("flow_step", scale_map, clamp, shift_clamp, layout, form, active, block, parity, inverse);
  const CouplingGeometry geometry = coupling_geometry("flow_step", x, raw, options);
  const StepInputs types(x, raw);
  const Tensor values = cuda::as_type(in.x, types.type, in.format);
  raw = cuda::as_type(raw, types.raw_type, in.format);
  Tensor y = empty_in(values, in.format);
  Tensor log_det = empty(in.x, {in.shape.samples}, in.weight.scalar_type());
  types.visit([&](auto s, auto r, auto t) {
    using S = decltype(s);
    using R = decltype(r);
    using T = decltype(t);
    Tensor partial = empty(in.x, {cuda::flow_step_forward_partial_size<S>(in.shape)}, in.weight.scalar_type());
    cuda::check(cuda::flow_step_forward(cuda::data<S>(values), cuda::data<R>(raw), cuda::data<T>(in.weight),
                                        cuda::data<T>(in.bias), cuda::data<S>(y), cuda::data<T>(log_det),
                                        cuda::data<T>(partial), in.shape, options, geometry,
                                        cuda::current_stream(in.x)));
  });
  return {cuda::as_type(y, x.scalar_type(), in.format), log_det};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_step_bwd(Tensor x, Tensor raw, Tensor weight, Tensor bias,
                                                         Tensor grad_y, Tensor grad_log_det, int64_t scale_map,
                                                         double clamp, double shift_clamp, int64_t layout, int64_t form,
                                                         int64_t active, int64_t block, int64_t parity, bool inverse) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cuda::MixInputs in("flow_step", x, weight, bias);
  const CouplingOptions options =
      coupling_options("flow_step", scale_map, clamp, shift_clamp, layout, form, active, block, parity, inverse);
  const CouplingGeometry geometry = coupling_geometry("flow_step", x, raw, options);
  check_gradients("flow_step", grad_y, grad_log_det, x);
  check_same_device("flow_step", "grad_y", grad_y, x);
  check_same_device("flow_step", "grad_log_det", grad_log_det, x);
  const StepInputs types(x, raw);
  const Tensor values = cuda::as_type(in.x, types.type, in.format);
  const Tensor raw_values = cuda::as_type(raw, types.raw_type, in.format);
  grad_y = cuda::as_type(grad_y, types.type, in.format);
  grad_log_det = cuda::as_type(grad_log_det, in.weight.scalar_type());
  Tensor grad_x = empty_in(values, in.format), grad_raw = empty_in(raw_values, in.format);
  Tensor grad_weight = empty_in(in.weight, MemoryFormat::Contiguous),
         grad_bias = empty_in(in.bias, MemoryFormat::Contiguous);
  types.visit([&](auto s, auto r, auto t) {
    using S = decltype(s);
    using R = decltype(r);
    using T = decltype(t);
    Tensor partial = empty(in.x, {cuda::flow_step_backward_partial_size<S>(in.shape)}, in.weight.scalar_type());
    cuda::check(cuda::flow_step_backward(
        cuda::data<S>(values), cuda::data<R>(raw_values), cuda::data<T>(in.weight), cuda::data<S>(grad_y),
        cuda::data<T>(grad_log_det), cuda::data<S>(grad_x), cuda::data<R>(grad_raw), cuda::data<T>(grad_weight),
        cuda::data<T>(grad_bias), cuda::data<T>(partial), in.shape, options, geometry, cuda::current_stream(in.x)));
  });
  return {cuda::as_type(grad_x, x.scalar_type(), in.format), cuda::as_type(grad_raw, raw.scalar_type(), in.format),
          cuda::as_type(grad_weight, weight.scalar_type()), cuda::as_type(grad_bias, bias.scalar_type())};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) {
  m.impl("flow_step_fwd", TORCH_BOX(&hflow::flow_step_fwd));
  m.impl("flow_step_bwd", TORCH_BOX(&hflow::flow_step_bwd));
}
