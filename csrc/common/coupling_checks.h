// The checks of the ops that contain a coupling, for the CPU and the CUDA host functions.
#pragma once

#include "common/check.h"
#include "common/coupling_geometry.h"
#include "common/tensor.h"

namespace hflow {

inline CouplingOptions coupling_options(const char* op, int64_t map, double clamp, double shift_clamp, int64_t layout,
                                        int64_t form, int64_t active, int64_t block, int64_t parity, bool inverse) {
  if (map < 0 || map >= kScaleMaps) fail(op, "scale_map must be 0 to ", kScaleMaps - 1, ", got ", map);
  if (!(clamp > 0)) fail(op, "clamp must be positive, got ", clamp);
  if (!(shift_clamp > 0)) fail(op, "shift_clamp must be positive, got ", shift_clamp);
  if (layout < 0 || layout > 3) fail(op, "layout must be 0 to 3, got ", layout);
  if (form < 0 || form > 2) fail(op, "form must be 0 to 2, got ", form);
  if (active < 0 || active > 5) fail(op, "active must be 0 to 5, got ", active);
  if (block != 1 && block != 2 && block != 4 && block != 8) fail(op, "block must be 1, 2, 4 or 8, got ", block);
  if (parity != 0 && parity != 1) fail(op, "parity must be 0 or 1, got ", parity);
  return {static_cast<ScaleMap>(map), clamp,  shift_clamp, static_cast<Layout>(layout), static_cast<Form>(form),
          static_cast<ActiveSet>(active), block, parity,      inverse};
}

// Checks x, and raw against x and the options.
inline CouplingGeometry coupling_geometry(const char* op, const Tensor& x, const Tensor& raw,
                                          const CouplingOptions& options) {
  check_flow_variable(op, "x", x);
  check_floating(op, "raw", raw);
  if (options.spatial() && (x.dim() < 3 || x.dim() > 4)) {
    fail(op, "a spatial active set needs x of shape (B, C, L) or (B, C, H, W), got ", shape_of(x));
  }
  const int64_t channels = x.size(1), passive = options.passive_channels(channels);
  const int64_t whole = options.raw_channels(channels), compact = options.raw_channels(channels - passive);
  const int64_t got = raw.dim() > 1 ? raw.size(1) : 0;
  if (got != whole && got != compact) {
    if (passive > 0) fail(op, "raw must have ", whole, " or ", compact, " channels, got ", shape_of(raw));
    fail(op, "raw must have ", whole, " channels, got ", shape_of(raw));
  }
  check_like(op, "raw", raw, x, got);
  check_same_device(op, "raw", raw, x);
  const int64_t width = x.dim() > 2 ? x.size(x.dim() - 1) : 1;
  return {options, channels, got, width > 0 ? pixels_of(x) / width : 0, width};
}

}  // namespace hflow
