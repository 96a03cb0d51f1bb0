// The two memory formats every op reads natively, and allocation in them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace hflow {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Flow variables and log-dets are computed in float64 for float64 input and in float32 for everything else.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> strides_of(torch::headeronly::IntHeaderOnlyArrayRef sizes, MemoryFormat format) {
  const int64_t dim = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(dim);
  int64_t stride = 1;
  const auto place = [&](int64_t d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  };
  if (format == MemoryFormat::ChannelsLast) {
    for (int64_t d : {1, 3, 2, 0}) place(d);
  } else {
    for (int64_t d = dim - 1; d >= 0; --d) place(d);
  }
  return strides;
}

inline bool has_format(const Tensor& tensor, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return tensor.is_contiguous();
  if (tensor.dim() != 4) return false;
  const std::vector<int64_t> expected = strides_of(tensor.sizes(), format);
  for (int64_t d = 0; d < 4; ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected[d]) return false;
  }
  return true;
}

// The format an op works in: channels_last for inputs that are so and not also contiguous, else contiguous.
inline MemoryFormat format_of(const Tensor& x) {
  if (!x.is_contiguous() && has_format(x, MemoryFormat::ChannelsLast)) return MemoryFormat::ChannelsLast;
  return MemoryFormat::Contiguous;
}

inline Tensor as_format(const Tensor& tensor, MemoryFormat format) {
  return has_format(tensor, format) ? tensor : torch::stable::contiguous(tensor, format);
}

namespace detail {
inline Tensor empty_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                            ScalarType type) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}
}  // namespace detail

// Uninitialised, with the dtype and device of `like`, dense in `format`.
inline Tensor empty_in(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, MemoryFormat format) {
  return detail::empty_strided(like, like.dim(), sizes.data(), strides_of(sizes, format).data(), like.scalar_type());
}

// The same, with the shape of `like`.
inline Tensor empty_in(const Tensor& like, MemoryFormat format) { return empty_in(like, like.sizes(), format); }

// Uninitialised and contiguous, on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  return detail::empty_strided(like, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), type);
}

// Elements per channel of one sample: H·W of (B, C, H, W), 1 of (B, C).
inline int64_t pixels_of(const Tensor& x) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  return pixels;
}

}  // namespace hflow
