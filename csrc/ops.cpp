// The schema of every op, one line each. Kernels register themselves in cpu/<op>.cpp and cuda/<op>.cu; fake, autograd
// and autocast implementations are registered in Python (hflow_fast/ops/<op>.py).
#include <torch/csrc/stable/library.h>

// How a coupling reads raw: the numbers of the enumerations in formulas.h and common/coupling_geometry.h.
#define COUPLING_OPTIONS                                                                                     \
  "int scale_map, float clamp, float shift_clamp, int layout, int form, int active, int block, int parity, " \
  "bool inverse"

// clang-format off
STABLE_TORCH_LIBRARY(hflow_fast, m) {
  m.def("actnorm_fwd(Tensor x, Tensor log_scale, Tensor bias, bool inverse) -> (Tensor y, Tensor log_det)");
  m.def("actnorm_bwd(Tensor x, Tensor log_scale, Tensor bias, Tensor grad_y, Tensor grad_log_det, bool inverse) -> (Tensor grad_x, Tensor grad_log_scale, Tensor grad_bias)");
  m.def("conv1x1_fwd(Tensor x, Tensor weight, Tensor bias) -> Tensor y");
  m.def("conv1x1_bwd(Tensor x, Tensor weight, Tensor bias, Tensor grad_y) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("conv3x3_fwd(Tensor x, Tensor weight, Tensor bias, int groups) -> Tensor y");
  m.def("conv3x3_bwd(Tensor x, Tensor weight, Tensor bias, Tensor grad_y, int groups) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("lu_fwd(Tensor weight) -> (Tensor log_abs_det, Tensor inverse)");
  m.def("lu_many_fwd(Tensor[] weights) -> (Tensor[] log_abs_dets, Tensor[] inverses)");
  m.def("coupling_fwd(Tensor x, Tensor raw, " COUPLING_OPTIONS ") -> (Tensor y, Tensor log_det)");
  m.def("coupling_bwd(Tensor x, Tensor raw, Tensor grad_y, Tensor grad_log_det, " COUPLING_OPTIONS ") -> (Tensor grad_x, Tensor grad_raw)");
  m.def("flow_step_fwd(Tensor x, Tensor raw, Tensor weight, Tensor bias, " COUPLING_OPTIONS ") -> (Tensor y, Tensor log_det)");
  m.def("flow_step_bwd(Tensor x, Tensor raw, Tensor weight, Tensor bias, Tensor grad_y, Tensor grad_log_det, " COUPLING_OPTIONS ") -> (Tensor grad_x, Tensor grad_raw, Tensor grad_weight, Tensor grad_bias)");
  m.def("haar_fwd(Tensor x, int levels, bool by_colour, float gain, float average_gain, bool inverse) -> Tensor y");
  m.def("resample_fwd(Tensor x, bool up, bool adjoint) -> Tensor y");
  m.def("instance_norm_fwd(Tensor x, float epsilon) -> Tensor y");
  m.def("instance_norm_bwd(Tensor x, Tensor grad_y, float epsilon) -> Tensor grad_x");
  m.def("bias_act_fwd(Tensor x, Tensor bias, Tensor residual, int activation, float slope, float gain) -> Tensor y");
  m.def("bias_act_bwd(Tensor x, Tensor bias, Tensor residual, Tensor grad_y, int activation, float slope, float gain) -> (Tensor grad_x, Tensor grad_bias, Tensor grad_residual)");
}
// clang-format on
