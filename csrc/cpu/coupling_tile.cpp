#include "cpu/coupling_tile.h"

#include <algorithm>

namespace hflow {

CouplingPlan::CouplingPlan(const char* op, const Tensor& x, const Tensor& raw, const CouplingOptions& options,
                           MemoryFormat format)
    : geometry(coupling_geometry(op, x, raw, options)) {
  const CouplingGeometry& g = geometry;
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  const int64_t inner = channels_last ? 1 : g.pixels();  // consecutive elements of one channel
  samples = x.size(0), sample = g.channels * g.pixels();
  period = g.channels * inner, lead = g.passive * inner, active = period - lead;
  raw_period = g.raw_channels * inner;
  scale_at = g.scale_channel(g.passive) * inner, shift_at = g.shift_channel(g.passive) * inner;
  // Where scales and shifts alternate element by element, they are one run of step 2.
  raw_step = inner == 1 ? g.raw_step : 1;
  segment = raw_step == g.raw_step ? active : inner;
  channel_stride = channels_last ? g.channels : 1;
}

namespace {

template <class Map, bool ShiftBefore, class T>
struct Forward {
  HFLOW_LEAF void run(const T* x, const T* s, const T* t, const T* mask, T* y, T* log_scale, int64_t n,
                      CouplingParameters<T> p) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T value, log_value;
      couple<Map, ShiftBefore>(x[i], s[i], t[i], p, value, log_value);
      const bool active = mask[i] != T(0);
      y[i] = active ? value : x[i];
      log_scale[i] = active ? log_value : T(0);
    }
  }
};

template <class Map, bool ShiftBefore, class T>
struct Backward {
  HFLOW_LEAF void run(const T* x, const T* s, const T* t, const T* mask, const T* grad_y, const T* grad_log_det, T* y,
                      T* grad_x, T* grad_s, T* grad_t, int64_t n, CouplingParameters<T> p) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T value, gx, gs, gt;
      couple_backward<Map, ShiftBefore>(x[i], s[i], t[i], grad_y[i], grad_log_det[i], p, value, gx, gs, gt);
      const bool active = mask[i] != T(0);
      y[i] = active ? value : x[i];
      grad_x[i] = active ? gx : grad_y[i];
      grad_s[i] = active ? gs : T(0);
      grad_t[i] = active ? gt : T(0);
    }
  }
};

// Leaf<Map, ShiftBefore, T>::run(args...) for the map and order at hand.
template <template <class, bool, class> class Leaf, class T, class... Args>
void run_coupling(ScaleMap scale_map, bool shift_before, Args... args) {
  visit_scale_map(scale_map, [&](auto map) {
    using Map = decltype(map);
    shift_before ? run_leaf<Leaf<Map, true, T>>(args...) : run_leaf<Leaf<Map, false, T>>(args...);
  });
}

}  // namespace

template <class T>
CouplingTile<T>::CouplingTile(const CouplingPlan& plan, const CouplingOptions& options, Memory x, Memory raw)
    : plan_(plan),
      map_(options.map),
      parameters_(options.form, options.clamp, options.shift_clamp, options.inverse),
      shift_before_(shift_comes_before(options.form, options.inverse)),
      x_(x),
      raw_(raw) {
  const CouplingGeometry& g = plan.geometry;
  if (!g.spatial) return;
  const int64_t line = g.width * plan.channel_stride;
  mask_lines_.resize(2 * line);
  for (int64_t e = 0; e < 2 * line; ++e) {
    const int side = static_cast<int>(e / line) + g.column_side(e % line / plan.channel_stride);
    mask_lines_[e] = (side & 1) == g.parity ? T(1) : T(0);
  }
}

template <class T>
void CouplingTile<T>::fill_mask(int64_t begin, int64_t n, T* mask) const {
  const CouplingGeometry& g = plan_.geometry;
  if (!g.spatial) {
    std::fill_n(mask, n, T(1));
    return;
  }
  const int64_t line = g.width * plan_.channel_stride;
  int64_t i = begin / line % g.height, j = begin % line;
  for (int64_t e = 0; e < n; j = 0, i = i + 1 == g.height ? 0 : i + 1) {
    const int64_t length = std::min(n - e, line - j);
    std::copy_n(mask_lines_.data() + g.row_side(i) * line + j, length, mask + e);
    e += length;
  }
}

// f(raw offset relative to *_at, tile offset, runs) for the raw values of whole periods.
template <class T>
template <class F>
void CouplingTile<T>::for_raw_runs(int64_t begin, int64_t n, const F& f) const {
  const CouplingPlan& p = plan_;
  const int64_t first = begin / p.period, count = n / p.period;
  if (p.segment == p.active) {
    f(first * p.raw_period, p.lead, Runs{count, p.active, p.raw_period, p.raw_step, p.period});
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    f((first + i) * p.raw_period, i * p.period + p.lead,
      Runs{p.active / p.segment, p.segment, 2 * p.segment, 1, p.segment});
  }
}

template <class T>
void CouplingTile<T>::gather_raw(int64_t begin, int64_t n, T* scale, T* shift) const {
  for_raw_runs(begin, n, [&](int64_t from, int64_t to, Runs runs) {
    if (plan_.geometry.scales) gather(raw_, from + plan_.scale_at, scale + to, runs);
    gather(raw_, from + plan_.shift_at, shift + to, runs);
  });
}

template <class T>
void CouplingTile<T>::scatter_raw(int64_t begin, int64_t n, const T* scale, const T* shift, Memory grad_raw) const {
  for_raw_runs(begin, n, [&](int64_t to, int64_t from, Runs runs) {
    if (plan_.geometry.scales) scatter(scale + from, grad_raw, to + plan_.scale_at, runs);
    scatter(shift + from, grad_raw, to + plan_.shift_at, runs);
  });
}

// f(offset in the range, length, raw offset relative to *_at, or −1 where passive) for the pieces of a range.
template <class T>
template <class F>
void CouplingTile<T>::for_segments(int64_t begin, int64_t n, const F& f) const {
  const CouplingPlan& p = plan_;
  for (int64_t e = 0; e < n;) {
    const int64_t i = (begin + e) / p.period, within = (begin + e) % p.period, j = within - p.lead;
    if (j < 0) {
      const int64_t length = std::min(n - e, p.lead - within);
      f(e, length, -1);
      e += length;
    } else {
      const int64_t k = j % p.segment, length = std::min(n - e, p.segment - k);
      f(e, length, i * p.raw_period + 2 * (j - k) + k * p.raw_step);
      e += length;
    }
  }
}

template <class T>
void CouplingTile<T>::forward(int64_t begin, int64_t n, T* y, T* log_scale) const {
  alignas(64) T x_buffer[kCouplingTile], mask[kCouplingTile];
  alignas(64) T s_buffer[kCouplingTile] = {}, t_buffer[kCouplingTile] = {};  // passive elements are gathered by nobody
  const T* x = load(x_, begin, n, x_buffer);
  fill_mask(begin, n, mask);
  const auto run = [&](int64_t e, int64_t length, const T* s, const T* t) {
    run_coupling<Forward, T>(map_, shift_before_, x + e, s, t, static_cast<const T*>(mask) + e, y + e,
                             log_scale + e, length, parameters_);
  };
  if (gathers() && begin % plan_.period == 0 && n % plan_.period == 0) {
    gather_raw(begin, n, s_buffer, t_buffer);
    for (int64_t e = 0; plan_.lead > 0 && e < n; e += plan_.period) std::fill_n(mask + e, plan_.lead, T(0));
    run(0, n, s_buffer, t_buffer);
    return;
  }
  for_segments(begin, n, [&](int64_t e, int64_t length, int64_t raw) {
    if (raw < 0) {
      std::copy_n(x + e, length, y + e);
      std::fill_n(log_scale + e, length, T(0));
    } else {
      const T* t = load_step(raw_, plan_.shift_at + raw, length, plan_.raw_step, t_buffer);
      const T* s =
          map_ == ScaleMap::none ? t : load_step(raw_, plan_.scale_at + raw, length, plan_.raw_step, s_buffer);
      run(e, length, s, t);
    }
  });
}

template <class T>
void CouplingTile<T>::backward(int64_t begin, int64_t n, const T* grad_y, const T* grad_log_det, T* y, T* grad_x,
                               Memory grad_raw) const {
  alignas(64) T x_buffer[kCouplingTile], mask[kCouplingTile];
  alignas(64) T s_buffer[kCouplingTile] = {}, t_buffer[kCouplingTile] = {};  // passive elements are gathered by nobody
  alignas(64) T grad_s[kCouplingTile], grad_t[kCouplingTile];
  const T* x = load(x_, begin, n, x_buffer);
  fill_mask(begin, n, mask);
  const auto run = [&](int64_t e, int64_t length, const T* s, const T* t, T* gs, T* gt) {
    run_coupling<Backward, T>(map_, shift_before_, x + e, s, t, static_cast<const T*>(mask) + e, grad_y + e,
                              grad_log_det + e, y + e, grad_x + e, gs, gt, length, parameters_);
  };
  if (gathers() && begin % plan_.period == 0 && n % plan_.period == 0) {
    gather_raw(begin, n, s_buffer, t_buffer);
    for (int64_t e = 0; plan_.lead > 0 && e < n; e += plan_.period) std::fill_n(mask + e, plan_.lead, T(0));
    run(0, n, s_buffer, t_buffer, grad_s, grad_t);
    scatter_raw(begin, n, grad_s, grad_t, grad_raw);
    return;
  }
  for_segments(begin, n, [&](int64_t e, int64_t length, int64_t raw) {
    if (raw < 0) {
      std::copy_n(x + e, length, y + e);
      std::copy_n(grad_y + e, length, grad_x + e);
      return;
    }
    const bool scales = plan_.geometry.scales, dense = plan_.raw_step == 1;
    const T* t = load_step(raw_, plan_.shift_at + raw, length, plan_.raw_step, t_buffer);
    const T* s = scales ? load_step(raw_, plan_.scale_at + raw, length, plan_.raw_step, s_buffer) : t;
    T* gs = scales && dense ? target(grad_raw, plan_.scale_at + raw, grad_s) : grad_s;
    T* gt = dense ? target(grad_raw, plan_.shift_at + raw, grad_t) : grad_t;
    run(e, length, s, t, gs, gt);
    const Runs runs{1, length, 0, plan_.raw_step, 0};
    if (scales && gs == grad_s) scatter(grad_s, grad_raw, plan_.scale_at + raw, runs);
    if (gt == grad_t) scatter(grad_t, grad_raw, plan_.shift_at + raw, runs);
  });
}

template class CouplingTile<float>;
template class CouplingTile<double>;

}  // namespace hflow
