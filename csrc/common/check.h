// Input checks. Every message names the op, the argument and what it got; Python sees a ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace hflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "hflow_fast." << op << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half: return;
    default:
      fail(op, name, " must be float32, float64, bfloat16 or float16, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

// The flow variable: (B, C, ...) of a floating dtype.
inline void check_flow_variable(const char* op, const char* name, const Tensor& tensor) {
  check_floating(op, name, tensor);
  if (tensor.dim() < 2) fail(op, name, " must have shape (B, C, ...), got ", shape_of(tensor));
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "cpu";
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  if (!(tensor.device() == x.device()))
    fail(op, name, " must be on the device of x, ", device_of(x), ", got ", device_of(tensor));
}

template <size_t N>
void check_shape(const char* op, const char* name, const Tensor& tensor, const int64_t (&shape)[N]) {
  bool same = tensor.dim() == static_cast<int64_t>(N);
  for (size_t d = 0; same && d < N; ++d) same = tensor.size(d) == shape[d];
  if (same) return;
  std::ostringstream expected;
  for (size_t d = 0; d < N; ++d) expected << (d ? ", " : "") << shape[d];
  fail(op, name, " must have shape (", expected.str(), N == 1 ? ",)" : ")", ", got ", shape_of(tensor));
}

// `tensor` must have the shape of x but for its number of channels.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x, int64_t channels) {
  bool same = tensor.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = tensor.size(d) == (d == 1 ? channels : x.size(d));
  if (!same)
    fail(op, name, " must have the shape of x, ", shape_of(x), ", with ", channels, " channels, got ",
         shape_of(tensor));
}

// A square matrix or a batch of them.
inline void check_matrices(const char* op, const Tensor& weight) {
  check_floating(op, "weight", weight);
  const int64_t dim = weight.dim();
  if ((dim != 2 && dim != 3) || weight.size(dim - 1) != weight.size(dim - 2))
    fail(op, "weight must have shape (C, C) or (N, C, C), got ", shape_of(weight));
}

// What autograd hands to the backward pass of an op that returns y, like x, and a log-det per sample.
inline void check_gradients(const char* op, const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& x) {
  check_floating(op, "grad_y", grad_y);
  check_floating(op, "grad_log_det", grad_log_det);
  check_like(op, "grad_y", grad_y, x, x.size(1));
  check_shape(op, "grad_log_det", grad_log_det, {x.size(0)});
}

inline constexpr int kMaxMixChannels = 32;

// The arguments of an op that mixes channels in a kernel.
inline void check_mix(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_flow_variable(op, "x", x);
  check_floating(op, "weight", weight);
  check_floating(op, "bias", bias);
  check_shape(op, "weight", weight, {x.size(1), x.size(1)});
  check_shape(op, "bias", bias, {x.size(1)});
  check_same_device(op, "weight", weight, x);
  check_same_device(op, "bias", bias, x);
  if (x.size(1) > kMaxMixChannels) fail(op, "x must have at most ", kMaxMixChannels, " channels here, got ", x.size(1));
}

}  // namespace hflow
