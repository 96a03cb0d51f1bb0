// The coupling on a stretch of memory, shared by coupling.cpp and flow_step.cpp: which raw values meet which element of
// x.
//
// Both memory formats are one linear walk over x. Its `period` (a sample where contiguous, a pixel in channels_last)
// starts with `lead` passive elements (a channel-half set) followed by active ones, whose scales and shifts lie in raw
// as alternating runs of `segment` elements: [scale run][shift run] once per period for halves, once per channel row
// for interleaved. Spatial sets are a 0/1 mask computed from the index.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/coupling_checks.h"
#include "common/rows.h"

namespace hflow {

struct CouplingPlan {
  CouplingGeometry geometry;
  int64_t samples, sample;                           // x is `samples` × `sample` elements
  int64_t period, lead, active, segment;             // in elements of x
  int64_t raw_period, raw_step, scale_at, shift_at;  // in elements of raw; *_at is where a period's first value lies
  int64_t channel_stride;                            // elements of x per pixel

  // Checks raw against x and the options. Both tensors are dense in `format`.
  CouplingPlan(const char* op, const Tensor& x, const Tensor& raw, const CouplingOptions& options, MemoryFormat format);
};

inline constexpr int64_t kCouplingTile = 512;  // elements a tile function takes at most: its buffers stay in L1

template <class T>
class CouplingTile {
 public:
  CouplingTile(const CouplingPlan& plan, const CouplingOptions& options, Memory x, Memory raw);

  // Elements per tile: whole periods where those are short, so that a tile's raw values are gathered in one go.
  int64_t tile() const { return gathers() ? kCouplingTile / plan_.period * plan_.period : kCouplingTile; }

  // y and log-scales (0 where passive) of elements [begin, begin + n) of x.
  void forward(int64_t begin, int64_t n, T* y, T* log_scale) const;

  // y once more and the gradients of the same elements; grad_log_det holds one value per element. Raw gradients of
  // passive channels are not written.
  void backward(int64_t begin, int64_t n, const T* grad_y, const T* grad_log_det, T* y, T* grad_x,
                Memory grad_raw) const;

 private:
  // Short segments are gathered, whole periods at a time; longer ones are walked one by one and read in place.
  bool gathers() const { return std::min(plan_.segment, plan_.active) < 64 && plan_.period <= kCouplingTile; }
  void fill_mask(int64_t begin, int64_t n, T* mask) const;
  void gather_raw(int64_t begin, int64_t n, T* scale, T* shift) const;
  void scatter_raw(int64_t begin, int64_t n, const T* scale, const T* shift, Memory grad_raw) const;
  template <class F>
  void for_raw_runs(int64_t begin, int64_t n, const F& f) const;
  template <class F>
  void for_segments(int64_t begin, int64_t n, const F& f) const;

  const CouplingPlan& plan_;
  ScaleMap map_;
  CouplingParameters<T> parameters_;
  bool shift_before_;
  Memory x_, raw_;
  std::vector<T> mask_lines_;  // of spatial sets: the two kinds of image rows
};

}  // namespace hflow
