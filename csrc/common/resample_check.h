// The check of resample's argument, which the CPU and the CUDA kernel share.
#pragma once

#include <vector>

#include "common/check.h"

namespace hflow {

// The sizes of the result; x is the gradient of one where `adjoint`.
inline std::vector<int64_t> resampled_sizes(const Tensor& x, bool up, bool adjoint) {
  check_flow_variable("resample", "x", x);
  if (x.dim() != 4) fail("resample", "x must have shape (B, C, H, W), got ", shape_of(x));
  const bool doubles = up != adjoint;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  for (int64_t d : {2, 3}) {
    const int64_t n = x.size(d), least = adjoint ? (up ? 4 : 1) : 2;
    if (n < least || (!doubles && n % 2 != 0))
      fail("resample", "x must have ", doubles ? "" : "even ", "H and W of at least ", least, " to be ",
           doubles ? "doubled" : "halved", "; pad or crop it, got ", shape_of(x));
    sizes[d] = doubles ? 2 * n : n / 2;
  }
  return sizes;
}

}  // namespace hflow
