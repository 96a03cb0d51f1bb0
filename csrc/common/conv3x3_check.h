// The checks of conv3x3's arguments.
#pragma once

#include "common/check.h"

namespace hflow {

inline void check_float32(const char* name, const Tensor& tensor, const Tensor& x) {
  if (tensor.scalar_type() != ScalarType::Float)
    fail("conv3x3", name, " must be float32, got ", torch::headeronly::toString(tensor.scalar_type()));
  check_same_device("conv3x3", name, tensor, x);
}

inline void check_conv3x3(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
  check_float32("x", x, x);
  check_float32("weight", weight, x);
  check_float32("bias", bias, x);
  if (x.dim() != 4) fail("conv3x3", "x must have shape (B, C, H, W), got ", shape_of(x));
  if (weight.dim() != 4) fail("conv3x3", "weight must have shape (K, C / groups, 3, 3), got ", shape_of(weight));
  if (groups < 1 || x.size(1) % groups != 0 || weight.size(0) % groups != 0)
    fail("conv3x3", "groups must divide the channels of x, ", x.size(1), ", and of the result, ", weight.size(0),
         ", got ", groups);
  check_shape("conv3x3", "weight", weight, {weight.size(0), x.size(1) / groups, 3, 3});
  check_shape("conv3x3", "bias", bias, {weight.size(0)});
}

inline void check_conv3x3_gradient(const Tensor& x, const Tensor& weight, const Tensor& grad_y) {
  check_float32("grad_y", grad_y, x);
  check_like("conv3x3", "grad_y", grad_y, x, weight.size(0));
}

}  // namespace hflow
