// The checks of bias_act's arguments, which the CPU and the CUDA kernel share.
#pragma once

#include "common/check.h"
#include "network_formulas.h"

namespace hflow {

// An empty vector stands for no bias and for no residual.
inline bool is_absent(const Tensor& tensor) { return tensor.dim() == 1 && tensor.numel() == 0; }

inline void check_bias_act(const Tensor& x, const Tensor& bias, const Tensor& residual, int64_t activation) {
  check_flow_variable("bias_act", "x", x);
  check_floating("bias_act", "bias", bias);
  check_floating("bias_act", "residual", residual);
  if (!is_absent(bias)) check_shape("bias_act", "bias", bias, {x.size(1)});
  if (!is_absent(residual)) check_like("bias_act", "residual", residual, x, x.size(1));
  check_same_device("bias_act", "bias", bias, x);
  check_same_device("bias_act", "residual", residual, x);
  if (activation < 0 || activation >= kActivations)
    fail("bias_act", "activation must be from 0 to ", kActivations - 1, ", got ", activation);
}

}  // namespace hflow
