// The checks of instance_norm's arguments, which the CPU and the CUDA kernel share.
#pragma once

#include "common/check.h"
#include "common/tensor.h"

namespace hflow {

inline void check_instance_norm(const Tensor& x, double epsilon) {
  check_flow_variable("instance_norm", "x", x);
  if ((pixels_of(x) == 1 ? x.size(1) : pixels_of(x)) == 1)
    fail("instance_norm", "x must have more than one pixel, or more than one channel of a single pixel, got ",
         shape_of(x));
  if (!(epsilon > 0)) fail("instance_norm", "epsilon must be above 0, got ", epsilon);
}

}  // namespace hflow
