// coupling on the CPU, forward, inverse and backward.
//
// Threads: units of about 8 Ki elements of x, whole samples where those are smaller. Bytes: one read of x and raw and
// one write of y forward; backward reads x, raw and grad_y and writes grad_x and grad_raw. The log-det is summed in the
// same pass: per tile in lanes, per unit in double, over the units of a sample in order.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "cpu/coupling_tile.h"

namespace hflow {
namespace {

// Units of work, fixed by the shape: whole samples, or pieces of one sample, cut between tiles.
struct Units {
  static constexpr int64_t kElements = 16 * kCouplingTile;
  int64_t samples, sample, tile, samples_per_unit, units_per_sample, length;

  Units(const CouplingPlan& plan, int64_t tile) : samples(plan.samples), sample(plan.sample), tile(tile) {
    samples_per_unit = std::max<int64_t>(1, kElements / sample);
    length = sample <= kElements ? sample * samples_per_unit : std::max<int64_t>(1, kElements / tile) * tile;
    units_per_sample = sample <= kElements ? 1 : (sample + length - 1) / length;
  }

  int64_t count() const {
    return units_per_sample > 1 ? samples * units_per_sample : (samples + samples_per_unit - 1) / samples_per_unit;
  }

  // f(first element, elements) for the tiles of a unit; a tile holds whole samples or a part of one.
  template <class F>
  void for_tiles(int64_t unit, const F& f) const {
    int64_t begin, end;
    if (units_per_sample > 1) {
      const int64_t start = unit / units_per_sample * sample;
      begin = start + unit % units_per_sample * length, end = std::min(begin + length, start + sample);
    } else {
      begin = unit * length, end = std::min(begin + length, samples * sample);
    }
    if (sample <= tile) {
      const int64_t whole = tile / sample * sample;
      for (; begin < end; begin += whole) f(begin, std::min(whole, end - begin));
      return;
    }
    while (begin < end) {
      const int64_t n = std::min(tile, sample - begin % sample);
      f(begin, std::min(n, end - begin));
      begin += n;
    }
  }
};

template <class T>
void forward(const CouplingPlan& plan, const CouplingOptions& options, Memory x, Memory raw, Memory y, T* log_det) {
  const CouplingTile<T> tile(plan, options, x, raw);
  const Units units(plan, tile.tile());
  std::vector<double> partial(units.units_per_sample > 1 ? units.count() : plan.samples);
  parallel_units(units.count(), units.length, [&](int64_t unit) {
    alignas(64) T out[kCouplingTile], log_scale[kCouplingTile];
    units.for_tiles(unit, [&](int64_t begin, int64_t n) {
      tile.forward(begin, n, target(y, begin, out), log_scale);
      store(out, y, begin, n);
      if (units.units_per_sample > 1) {
        partial[unit] += sum(log_scale, n);
      } else {
        for (int64_t e = 0; e < n; e += plan.sample)
          partial[(begin + e) / plan.sample] += sum(log_scale + e, std::min(plan.sample, n - e));
      }
    });
  });
  for (int64_t b = 0; b < plan.samples; ++b) {
    double total = 0;
    for (int64_t k = 0; k < units.units_per_sample; ++k) total += partial[b * units.units_per_sample + k];
    log_det[b] = static_cast<T>(total);
  }
}

template <class T>
void backward(const CouplingPlan& plan, const CouplingOptions& options, Memory x, Memory raw, Memory grad_y,
              Memory grad_log_det, Memory grad_x, Memory grad_raw) {
  const CouplingTile<T> tile(plan, options, x, raw);
  const Units units(plan, tile.tile());
  parallel_units(units.count(), units.length, [&](int64_t unit) {
    alignas(64) T in[kCouplingTile], y[kCouplingTile], out[kCouplingTile], per_element[kCouplingTile];
    units.for_tiles(unit, [&](int64_t begin, int64_t n) {
      for (int64_t e = 0; e < n; e += plan.sample) {
        T value;
        const T* gradient = load(grad_log_det, (begin + e) / plan.sample, 1, &value);
        std::fill_n(per_element + e, std::min(plan.sample, n - e), *gradient);
      }
      tile.backward(begin, n, load(grad_y, begin, n, in), per_element, y, target(grad_x, begin, out), grad_raw);
      store(out, grad_x, begin, n);
    });
  });
}

std::tuple<Tensor, Tensor> coupling_fwd(Tensor x, Tensor raw, int64_t scale_map, double clamp, double shift_clamp,
                                        int64_t layout, int64_t form, int64_t active, int64_t block, int64_t parity,
                                        bool inverse) {
  const CouplingOptions options =
      coupling_options("coupling", scale_map, clamp, shift_clamp, layout, form, active, block, parity, inverse);
  const MemoryFormat format = format_of(x);
  const CouplingPlan plan("coupling", x, raw, options, format);
  x = as_format(x, format), raw = as_format(raw, format);
  Tensor y = empty_in(x, format);
  Tensor log_det = empty(x, {x.size(0)}, compute_type(x.scalar_type()));
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* values = static_cast<T*>(log_det.data_ptr());
    if (x.numel() == 0)
      std::fill_n(values, x.size(0), T(0));
    else
      forward<T>(plan, options, Memory::of(x), Memory::of(raw), Memory::of(y), values);
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor> coupling_bwd(Tensor x, Tensor raw, Tensor grad_y, Tensor grad_log_det, int64_t scale_map,
                                        double clamp, double shift_clamp, int64_t layout, int64_t form, int64_t active,
                                        int64_t block, int64_t parity, bool inverse) {
  const CouplingOptions options =
      coupling_options("coupling", scale_map, clamp, shift_clamp, layout, form, active, block, parity, inverse);
  const MemoryFormat format = format_of(x);
  const CouplingPlan plan("coupling", x, raw, options, format);
  check_gradients("coupling", grad_y, grad_log_det, x);
  x = as_format(x, format), raw = as_format(raw, format), grad_y = as_format(grad_y, format);
  grad_log_det = as_format(grad_log_det, MemoryFormat::Contiguous);
  Tensor grad_x = empty_in(x, format), grad_raw = empty_in(raw, format);
  if (plan.geometry.ignores_raw() || x.numel() == 0) torch::stable::zero_(grad_raw);
  if (x.numel() > 0) {
    visit_compute_type(x.scalar_type(), [&](auto t) {
      backward<decltype(t)>(plan, options, Memory::of(x), Memory::of(raw), Memory::of(grad_y), Memory::of(grad_log_det),
                            Memory::of(grad_x), Memory::of(grad_raw));
    });
  }
  return {grad_x, grad_raw};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("coupling_fwd", TORCH_BOX(&hflow::coupling_fwd));
  m.impl("coupling_bwd", TORCH_BOX(&hflow::coupling_bwd));
}
