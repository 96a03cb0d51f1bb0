// flow_step on the CPU: coupling, then y = W u + b per pixel, up to 32 channels, and its backward. (Python composes
// coupling and matmul for more channels.)
//
// Threads: fixed groups of consecutive tiles, of about 4 Ki elements each. Bytes: one read of x and raw and one write
// of y; backward reads x, raw and grad_y, recomputes u on the way, and writes grad_x and grad_raw. Between coupling and
// mixing a tile stays in cache, as rows of pixels; channels_last memory is coupled in place and transposed there.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/channel_mix.h"
#include "cpu/coupling_tile.h"

namespace hflow {
namespace {

constexpr int64_t kTileElements = 4096;  // long rows are worth more than buffers that fit in L1: they stay in L2

template <class T>
struct FlowStep {
  Tiling tiling;
  CouplingPlan plan;
  CouplingTile<T> coupling;
  Memory x;
  bool single_pixels;  // a tile holds whole samples of one pixel each

  FlowStep(const Tensor& x, const Tensor& raw, const CouplingPlan& plan, const CouplingOptions& options,
           MemoryFormat format)
      : tiling(x, format, kTileElements, false),
        plan(plan),
        coupling(this->plan, options, Memory::of(x), Memory::of(raw)),
        x(Memory::of(x)),
        single_pixels(pixels_of(x) == 1) {}
  FlowStep(const FlowStep&) = delete;  // `coupling` refers to `plan`

  bool interleaved() const { return tiling.pixel_stride != 1 || tiling.channel_stride == 1; }
  int64_t first_sample(int64_t offset) const { return offset / plan.sample; }
  int64_t tile_index(int64_t offset) const {
    const int64_t block = tiling.channels * tiling.pixels;
    return offset / block * tiling.tiles_per_sample() + offset % block / tiling.pixel_stride / tiling.tile;
  }

  // f(first element of x, elements, place in the tile's own memory order or rows) for the stretches a coupling takes.
  template <class F>
  void for_stretches(int64_t offset, int64_t n, const F& f) const {
    if (interleaved()) {
      const int64_t total = n * tiling.channels, step = coupling.tile();
      for (int64_t e = 0; e < total; e += step) f(offset + e, std::min(step, total - e), e);
      return;
    }
    for (int64_t c = 0; c < tiling.channels; ++c) {
      for (int64_t p = 0; p < n; p += kCouplingTile) {
        f(offset + c * tiling.channel_stride + p, std::min(kCouplingTile, n - p), c * tiling.tile + p);
      }
    }
  }

  // u, the coupled x, as rows; on_log_scale(first element of x, values, n) sees the log-scales.
  template <class F>
  void couple(int64_t offset, int64_t n, T* rows, T* scratch, const F& on_log_scale) const {
    alignas(64) T log_scale[kCouplingTile];
    T* u = interleaved() ? scratch : rows;
    for_stretches(offset, n, [&](int64_t begin, int64_t length, int64_t place) {
      coupling.forward(begin, length, u + place, log_scale);
      on_log_scale(begin, static_cast<const T*>(log_scale), length);
    });
    to_rows(u, rows, n);
  }

  // From grad_u in rows: u in rows, grad_x and grad_raw. `scratch` holds two tiles.
  void couple_backward(int64_t offset, int64_t n, const T* grad_rows, T* rows, T* scratch, Memory grad_log_det,
                       Memory grad_x, Memory grad_raw) const {
    alignas(64) T per_element[kCouplingTile], out[kCouplingTile];
    T* u = rows;
    const T* grad_u = grad_rows;
    if (interleaved()) {
      u = scratch, grad_u = scratch + kTileElements;
      scatter(grad_rows, {scratch + kTileElements, scalar_type_of<T>}, 0, tiling.runs(n));
    }
    for_stretches(offset, n, [&](int64_t begin, int64_t length, int64_t place) {
      for (int64_t e = 0; e < length;) {  // a stretch of single pixels spans samples
        const int64_t stop = std::min(length, e + plan.sample - (begin + e) % plan.sample);
        T value;
        const T gradient = *load(grad_log_det, first_sample(begin + e), 1, &value);
        std::fill(per_element + e, per_element + stop, gradient);
        e = stop;
      }
      coupling.backward(begin, length, grad_u + place, per_element, u + place, target(grad_x, begin, out), grad_raw);
      store(out, grad_x, begin, length);
    });
    to_rows(u, rows, n);
  }

  void to_rows(T* u, T* rows, int64_t n) const {
    if (u != rows) gather({u, scalar_type_of<T>}, 0, rows, tiling.runs(n));
  }
};

template <class T>
void forward(const FlowStep<T>& step, const T* weight, const T* bias, Memory y, T* log_det) {
  const Tiling& tiling = step.tiling;
  std::vector<double> partial(step.single_pixels ? step.plan.samples : tiling.tiles());
  tiling.for_groups([&](int64_t group) {
    alignas(64) T rows[kTileElements], scratch[kTileElements];
    tiling.for_tiles(group, [&](int64_t offset, int64_t n) {
      step.couple(offset, n, rows, scratch, [&](int64_t begin, const T* log_scale, int64_t length) {
        if (step.single_pixels) {
          for (int64_t e = 0; e < length; e += tiling.channels)
            partial[step.first_sample(begin + e)] = sum(log_scale + e, tiling.channels);
        } else {
          partial[step.tile_index(offset)] += sum(log_scale, length);
        }
      });
      const Tile<T> out(tiling, y, offset, scratch);
      mix<T>(static_cast<const T*>(rows), tiling.tile, out.rows, out.stride, n, tiling.channels, weight, bias);
      out.store(tiling, y, offset, n, scratch);
    });
  });
  const int64_t tiles = step.single_pixels ? 1 : tiling.tiles_per_sample();
  for (int64_t b = 0; b < step.plan.samples; ++b) {
    const auto first = partial.begin() + b * tiles;
    log_det[b] = static_cast<T>(std::accumulate(first, first + tiles, 0.0));
  }
}

// Writes grad_x and grad_raw; returns grad_weight followed by grad_bias.
template <class T>
std::vector<double> backward(const FlowStep<T>& step, const T* transposed, Memory grad_y, Memory grad_log_det,
                             Memory grad_x, Memory grad_raw) {
  const Tiling& tiling = step.tiling;
  const std::vector<T> zeros(tiling.channels);
  GroupSums<T> sums(tiling);
  tiling.for_groups([&](int64_t group) {
    alignas(64) T rows[kTileElements], scratch[2 * kTileElements], grad_buffer[kTileElements], grad_rows[kTileElements];
    std::vector<T> lanes = sums.lanes();
    tiling.for_tiles(group, [&](int64_t offset, int64_t n) {
      const Tile<T> grad = Tile<T>::load(tiling, grad_y, offset, n, grad_buffer);
      const T *g = grad.rows, *u = rows;
      mix<T>(g, grad.stride, static_cast<T*>(grad_rows), tiling.tile, n, tiling.channels, transposed, zeros.data());
      step.couple_backward(offset, n, grad_rows, rows, scratch, grad_log_det, grad_x, grad_raw);
      add_outer_product<T>(g, grad.stride, u, tiling.tile, n, tiling.channels, lanes.data());
    });
    sums.fold(group, lanes);
  });
  return sums.total();
}

std::tuple<Tensor, Tensor> flow_step_fwd(Tensor x, Tensor raw, Tensor weight, Tensor bias, int64_t scale_map,
                                         double clamp, double shift_clamp, int64_t layout, int64_t form, int64_t active,
                                         int64_t block, int64_t parity, bool inverse) {
  check_mix("flow_step", x, weight, bias);
  const CouplingOptions options =
      coupling_options("flow_step", scale_map, clamp, shift_clamp, layout, form, active, block, parity, inverse);
  const MemoryFormat format = format_of(x);
  const CouplingPlan plan("flow_step", x, raw, options, format);
  x = as_format(x, format), raw = as_format(raw, format);
  weight = as_format(weight, MemoryFormat::Contiguous), bias = as_format(bias, MemoryFormat::Contiguous);
  Tensor y = empty_in(x, format);
  Tensor log_det = empty(x, {x.size(0)}, compute_type(x.scalar_type()));
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* values = static_cast<T*>(log_det.data_ptr());
    std::fill_n(values, x.size(0), T(0));
    if (x.numel() == 0) return;
    std::vector<T> bias_values(x.size(1));
    gather(Memory::of(bias), 0, bias_values.data(), {1, x.size(1), 0, 1, 0});
    forward<T>({x, raw, plan, options, format}, matrix_of<T>(weight, false).data(), bias_values.data(), Memory::of(y),
               values);
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_step_bwd(Tensor x, Tensor raw, Tensor weight, Tensor bias,
                                                         Tensor grad_y, Tensor grad_log_det, int64_t scale_map,
                                                         double clamp, double shift_clamp, int64_t layout, int64_t form,
                                                         int64_t active, int64_t block, int64_t parity, bool inverse) {
  check_mix("flow_step", x, weight, bias);
  const CouplingOptions options =
      coupling_options("flow_step", scale_map, clamp, shift_clamp, layout, form, active, block, parity, inverse);
  const MemoryFormat format = format_of(x);
  const CouplingPlan plan("flow_step", x, raw, options, format);
  check_gradients("flow_step", grad_y, grad_log_det, x);
  x = as_format(x, format), raw = as_format(raw, format), grad_y = as_format(grad_y, format);
  weight = as_format(weight, MemoryFormat::Contiguous),
  grad_log_det = as_format(grad_log_det, MemoryFormat::Contiguous);
  Tensor grad_x = empty_in(x, format), grad_raw = empty_in(raw, format);
  Tensor grad_weight = empty_in(weight, MemoryFormat::Contiguous), grad_bias = empty_in(bias, MemoryFormat::Contiguous);
  if (plan.geometry.ignores_raw() || x.numel() == 0) torch::stable::zero_(grad_raw);
  const int64_t channels = x.size(1);
  std::vector<double> sums(channels * channels + channels);
  if (x.numel() > 0) {
    visit_compute_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      sums = backward<T>({x, raw, plan, options, format}, matrix_of<T>(weight, true).data(), Memory::of(grad_y),
                         Memory::of(grad_log_det), Memory::of(grad_x), Memory::of(grad_raw));
    });
  }
  scatter(sums.data(), Memory::of(grad_weight), 0, {1, channels * channels, 0, 1, 0});
  scatter(sums.data() + channels * channels, Memory::of(grad_bias), 0, {1, channels, 0, 1, 0});
  return {grad_x, grad_raw, grad_weight, grad_bias};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("flow_step_fwd", TORCH_BOX(&hflow::flow_step_fwd));
  m.impl("flow_step_bwd", TORCH_BOX(&hflow::flow_step_bwd));
}
