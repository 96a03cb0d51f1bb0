// coupling on CUDA tensors: checks, allocation, device guard, current stream. The kernels are in coupling.cuh.
//
// raw is read in its own dtype where that is x's, or a half type beside float32 x, which is what mixed precision gives.
// Any other mixture is converted to x's dtype first.
#include "cuda/coupling.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/coupling_checks.h"
#include "cuda/tensor.cuh"

namespace hflow {
namespace {

bool reads_raw(ScalarType raw, ScalarType x) {
  return raw == x || (x == ScalarType::Float && raw != ScalarType::Double);
}

struct Inputs {
  CouplingOptions options;
  MemoryFormat format;
  cuda::CouplingMemory memory;
  Tensor x, raw;  // dense in `format`

  Inputs(const Tensor& x, const Tensor& raw, const CouplingOptions& options)
      : options(options),
        format(format_of(x)),
        memory(coupling_geometry("coupling", x, raw, options), x.size(0), format == MemoryFormat::ChannelsLast),
        x(as_format(x, format)),
        raw(in_type(raw, reads_raw(raw.scalar_type(), x.scalar_type()) ? raw.scalar_type() : x.scalar_type())) {}

  Tensor in_type(const Tensor& tensor, ScalarType type) const {
    return as_format(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type), format);
  }
};

// Calls f(S{}, R{}, T{}) with the types of x, raw and the log-det.
template <class F>
void visit_coupling_types(const Inputs& in, const F& f) {
  cuda::visit_types(in.x.scalar_type(), [&](auto s, auto t) {
    if constexpr (std::is_same_v<decltype(s), float>) {
      cuda::visit_types(in.raw.scalar_type(), [&](auto r, auto) {
        if constexpr (!std::is_same_v<decltype(r), double>) f(s, r, t);
      });
    } else {
      f(s, s, t);
    }
  });
}

std::tuple<Tensor, Tensor> coupling_fwd(Tensor x, Tensor raw, int64_t scale_map, double clamp, double shift_clamp,
                                        int64_t layout, int64_t form, int64_t active, int64_t block, int64_t parity,
                                        bool inverse) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Inputs in(x, raw,
                  coupling_options("coupling", scale_map, clamp, shift_clamp, layout, form, active, block, parity,
                                   inverse));
  Tensor y = empty_in(in.x, in.format);
  Tensor log_det = empty(in.x, {in.memory.samples}, compute_type(in.x.scalar_type()));
  visit_coupling_types(in, [&](auto s, auto r, auto t) {
    using S = decltype(s);
    using R = decltype(r);
    using T = decltype(t);
    Tensor partial = empty(in.x, {cuda::coupling_partial_size<S>(in.memory)}, ScalarType::Double);
    cuda::check(cuda::coupling_forward(cuda::data<S>(in.x), cuda::data<R>(in.raw), cuda::data<S>(y),
                                       cuda::data<T>(log_det), cuda::data<double>(partial), in.memory, in.options,
                                       cuda::current_stream(in.x)));
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor> coupling_bwd(Tensor x, Tensor raw, Tensor grad_y, Tensor grad_log_det, int64_t scale_map,
                                        double clamp, double shift_clamp, int64_t layout, int64_t form, int64_t active,
                                        int64_t block, int64_t parity, bool inverse) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Inputs in(x, raw,
                  coupling_options("coupling", scale_map, clamp, shift_clamp, layout, form, active, block, parity,
                                   inverse));
  check_gradients("coupling", grad_y, grad_log_det, x);
  check_same_device("coupling", "grad_y", grad_y, x);
  check_same_device("coupling", "grad_log_det", grad_log_det, x);
  grad_y = in.in_type(grad_y, x.scalar_type());
  grad_log_det = cuda::as_type(grad_log_det, compute_type(x.scalar_type()));
  Tensor grad_x = empty_in(in.x, in.format), grad_raw = empty_in(in.raw, in.format);
  visit_coupling_types(in, [&](auto s, auto r, auto t) {
    using S = decltype(s);
    using R = decltype(r);
    using T = decltype(t);
    cuda::check(cuda::coupling_backward(cuda::data<S>(in.x), cuda::data<R>(in.raw), cuda::data<S>(grad_y),
                                        cuda::data<T>(grad_log_det), cuda::data<S>(grad_x), cuda::data<R>(grad_raw),
                                        in.memory, in.options, cuda::current_stream(in.x)));
  });
  return {grad_x, in.in_type(grad_raw, raw.scalar_type())};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) {
  m.impl("coupling_fwd", TORCH_BOX(&hflow::coupling_fwd));
  m.impl("coupling_bwd", TORCH_BOX(&hflow::coupling_bwd));
}
