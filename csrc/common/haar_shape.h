// What the haar kernels check, and the shape they give.
#pragma once

#include <vector>

#include "common/check.h"

namespace hflow {

// The shape of the other side of x: of its bands, or of its image if `inverse`.
inline std::vector<int64_t> haar_shape(const Tensor& x, int64_t levels, bool inverse) {
  check_flow_variable("haar", "x", x);
  const int64_t dims = x.dim() - 2;
  if (dims < 1 || dims > 3)
    fail("haar", "x must have shape (B, C, L), (B, C, H, W) or (B, C, D, H, W), got ", shape_of(x));
  if (levels < 1 || levels > 30 / dims) fail("haar", "levels must be from 1 to ", 30 / dims, ", got ", levels);
  const int64_t n = int64_t{1} << (dims * levels), side = int64_t{1} << levels;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  if (inverse && sizes[1] % n != 0)
    fail("haar", "x must have a multiple of ", n, " channels for the inverse of ", levels, " level(s), got ",
         shape_of(x));
  sizes[1] = inverse ? sizes[1] / n : sizes[1] * n;
  for (int64_t d = 2; d < x.dim(); ++d) {
    if (!inverse && sizes[d] % side != 0)
      fail("haar", "the spatial sizes of x must be multiples of ", side, " for ", levels, " level(s), got ",
           shape_of(x));
    sizes[d] = inverse ? sizes[d] * side : sizes[d] / side;
  }
  return sizes;
}

}  // namespace hflow
