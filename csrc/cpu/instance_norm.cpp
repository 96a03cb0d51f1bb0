// instance_norm on the CPU: (x − mean)/√(var + ε) per channel of a sample, and backward.
//
// Threads: about 16 Ki elements: some planes (contiguous), or a block of a sample's channels (channels_last), so that no
// sum crosses threads. Bytes: from memory one read and one write of x forward, two reads and one write backward; a unit
// is read three times (mean, moments, result), the last two from the cache. A single pixel's channels count as a plane.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "common/instance_norm_check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"
#include "network_formulas.h"

namespace hflow {
namespace {

constexpr int64_t kUnit = 16384;             // elements of small planes per unit of work
constexpr int64_t kLanes = 64;               // channels of a block: sums side by side hide the latency of addition
constexpr int64_t kRowsPerSum = 64;          // elements of a lane added in T before a sum goes on in double
constexpr int64_t kLine = 16;                // blocks have multiples of these channels: units share no cache line
constexpr int64_t kBlockElements = 1 << 17;  // of a block of channels, which stays in L2

// What is normalised at once: `channels` ≤ kLanes side by side, in `pixels` pixels `stride` elements apart.
struct Block {
  int64_t channels, pixels, stride;
};

// A plane is a row of pixels of one channel, which every lane shares. Sums run in a constant number of lanes, for the
// compiler to hold in registers.
struct Plane {
  static constexpr int most_channels = 1;
  int64_t channels = 1, pixels;

  HFLOW_HD explicit Plane(const Block& block) : pixels(block.pixels) {}

  // sums[q][c] over all pixels of channel c, of the values that term(i, c, values) finds for element i.
  template <class T, int Count, class Term>
  HFLOW_HD void sum(const Term& term, double (&sums)[Count][most_channels]) const {
    constexpr int64_t lanes = 32, most = kRowsPerSum * lanes;
    for (int q = 0; q < Count; ++q) sums[q][0] = 0;
    for (int64_t begin = 0; begin < pixels; begin += most) {
      alignas(64) T totals[Count][lanes] = {};
      const int64_t end = std::min(begin + most, pixels), whole = begin + (end - begin) / lanes * lanes;
      T values[Count];
      for (int64_t i = begin; i < whole; i += lanes) {
#pragma GCC ivdep
        for (int64_t l = 0; l < lanes; ++l) {
          term(i + l, 0, values);
          for (int q = 0; q < Count; ++q) totals[q][l] += values[q];
        }
      }
      for (int64_t i = whole; i < end; ++i) {
        term(i, 0, values);
        for (int q = 0; q < Count; ++q) totals[q][i - whole] += values[q];
      }
      for (int q = 0; q < Count; ++q) {
        for (int64_t width = lanes / 2; width > 0; width /= 2)
          for (int64_t l = 0; l < width; ++l) totals[q][l] += totals[q][l + width];
        sums[q][0] += static_cast<double>(totals[q][0]);
      }
    }
  }

  // f(i, c) for every element i, of channel c.
  template <class F>
  HFLOW_HD void for_each(const F& f) const {
#pragma GCC ivdep
    for (int64_t i = 0; i < pixels; ++i) f(i, 0);
  }
};

// Some channels of interleaved pixels; each has its own lane.
struct Interleaved {
  static constexpr int most_channels = kLanes;
  int64_t channels, pixels, stride;

  HFLOW_HD explicit Interleaved(const Block& block)
      : channels(block.channels), pixels(block.pixels), stride(block.stride) {}

  template <class T, int Count, class Term>
  HFLOW_HD void sum(const Term& term, double (&sums)[Count][most_channels]) const {
    for (int q = 0; q < Count; ++q) std::fill_n(sums[q], channels, 0.0);
    for (int64_t begin = 0; begin < pixels; begin += kRowsPerSum) {
      alignas(64) T totals[Count][kLanes] = {};
      for (int64_t pixel = begin; pixel < std::min(begin + kRowsPerSum, pixels); ++pixel) {
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          T values[Count];
          term(pixel * stride + c, c, values);
          for (int q = 0; q < Count; ++q) totals[q][c] += values[q];
        }
      }
      for (int q = 0; q < Count; ++q)
        for (int64_t c = 0; c < channels; ++c) sums[q][c] += static_cast<double>(totals[q][c]);
    }
  }

  template <class F>
  HFLOW_HD void for_each(const F& f) const {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) f(pixel * stride + c, c);
    }
  }
};

template <class T>
struct Values {
  const T* x;

  HFLOW_HD void operator()(int64_t i, int64_t, T (&values)[1]) const { values[0] = x[i]; }
};

template <class T>
struct Moments {
  const T *x, *center;

  HFLOW_HD void operator()(int64_t i, int64_t c, T (&values)[2]) const {
    values[0] = x[i] - center[c];
    values[1] = values[0] * values[0];
  }
};

template <class T>
struct Products {
  const T *x, *center, *grad;

  HFLOW_HD void operator()(int64_t i, int64_t c, T (&values)[4]) const {
    values[0] = x[i] - center[c];
    values[1] = values[0] * values[0];
    values[2] = grad[i];
    values[3] = grad[i] * values[0];
  }
};

// The means, as far as T holds them.
template <class T, class Layout>
HFLOW_LEAF void find_centers(const Layout& layout, const T* x, T* center) {
  double sums[1][Layout::most_channels];
  layout.template sum<T>(Values<T>{x}, sums);
  for (int64_t c = 0; c < layout.channels; ++c)
    center[c] = static_cast<T>(sums[0][c] / static_cast<double>(layout.pixels));
}

// `count` blocks, one after another.
template <class T, class Layout>
struct Forward {
  HFLOW_LEAF void run(const T* x, T* y, int64_t count, Block block, double epsilon) {
    const Layout layout(block);
    for (int64_t b = 0; b < count; ++b, x += block.pixels, y += block.pixels) {
      alignas(64) T center[Layout::most_channels], scale[Layout::most_channels], shift[Layout::most_channels];
      find_centers(layout, x, center);
      double sums[2][Layout::most_channels];
      layout.template sum<T>(Moments<T>{x, center}, sums);
      for (int64_t c = 0; c < layout.channels; ++c) {
        const InstanceNorm<double> norm(static_cast<double>(block.pixels), sums[0][c], sums[1][c], epsilon);
        scale[c] = static_cast<T>(norm.scale()), shift[c] = static_cast<T>(norm.shift());
      }
      layout.for_each([&](int64_t i, int64_t c) __attribute__((always_inline)) {
        y[i] = (x[i] - center[c]) * scale[c] + shift[c];
      });
    }
  }
};

template <class T, class Layout>
struct Backward {
  HFLOW_LEAF void run(const T* x, const T* grad_y, T* grad_x, int64_t count, Block block, double epsilon) {
    constexpr int most = Layout::most_channels;
    const Layout layout(block);
    for (int64_t b = 0; b < count; ++b, x += block.pixels, grad_y += block.pixels, grad_x += block.pixels) {
      alignas(64) T center[most], of_grad[most], of_d[most], constant[most];
      find_centers(layout, x, center);
      double sums[4][most];
      layout.template sum<T>(Products<T>{x, center, grad_y}, sums);
      for (int64_t c = 0; c < layout.channels; ++c) {
        const InstanceNorm<double> norm(static_cast<double>(block.pixels), sums[0][c], sums[1][c], epsilon);
        const InstanceNormGradient<double> gradient(norm, sums[2][c], sums[3][c]);
        of_grad[c] = static_cast<T>(gradient.of_grad), of_d[c] = static_cast<T>(gradient.of_d);
        constant[c] = static_cast<T>(gradient.constant);
      }
      layout.for_each([&](int64_t i, int64_t c) __attribute__((always_inline)) {
        grad_x[i] = of_grad[c] * grad_y[i] + (of_d[c] * (x[i] - center[c]) + constant[c]);
      });
    }
  }
};

// `count` blocks of a tensor as a leaf reads them: the memory itself, which then holds T, or a dense copy.
template <class T>
class BlockBuffer {
 public:
  BlockBuffer(Memory memory, int64_t offset, int64_t count, const Block& block, bool direct)
      : memory_(memory),
        offset_(offset),
        direct_(direct),
        runs_{count * block.pixels, block.channels, block.stride, 1, block.channels},
        copy_(direct ? nullptr : new T[runs_.outer * runs_.inner]) {
    if (block.stride == block.channels) runs_ = {1, runs_.outer * runs_.inner, 0, 1, 0};
  }

  const T* read() {
    if (!direct_) gather(memory_, offset_, copy_.get(), runs_);
    return data();
  }
  T* data() { return direct_ ? static_cast<T*>(memory_.data) + offset_ : copy_.get(); }
  void write() {
    if (!direct_) scatter(copy_.get(), memory_, offset_, runs_);
  }

 private:
  Memory memory_;
  int64_t offset_;
  bool direct_;
  Runs runs_;
  std::unique_ptr<T[]> copy_;
};

// f(offset, count, block) for every unit of work: `count` dense blocks, or one of some channels.
template <class F>
void for_blocks(const Tensor& x, MemoryFormat format, const F& f) {
  const int64_t samples = x.size(0), channels = x.size(1), pixels = pixels_of(x);
  if (format == MemoryFormat::Contiguous) {
    const int64_t n = pixels == 1 ? channels : pixels, planes = x.numel() / n;
    const int64_t per_unit = std::max<int64_t>(1, kUnit / n);
    parallel_units((planes + per_unit - 1) / per_unit, n * per_unit, [&](int64_t unit) {
      f(unit * per_unit * n, std::min(per_unit, planes - unit * per_unit), Block{1, n, 1});
    });
    return;
  }
  const int64_t width = std::clamp(kBlockElements / pixels / kLine * kLine, kLine, kLanes);
  const int64_t blocks = (channels + width - 1) / width;
  parallel_units(samples * blocks, pixels * width, [&](int64_t unit) {
    const int64_t sample = unit / blocks, channel = unit % blocks * width;
    f(sample * channels * pixels + channel, int64_t{1}, Block{std::min(width, channels - channel), pixels, channels});
  });
}

Tensor instance_norm_fwd(Tensor x, double epsilon) {
  check_instance_norm(x, epsilon);
  const MemoryFormat format = format_of(x);
  x = as_format(x, format);
  Tensor y = empty_in(x, format);
  if (x.numel() == 0) return y;
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const bool direct = x.scalar_type() == scalar_type_of<T>;
    for_blocks(x, format, [&](int64_t offset, int64_t count, Block block) {
      BlockBuffer<T> in(Memory::of(x), offset, count, block, direct), out(Memory::of(y), offset, count, block, direct);
      if (!direct) block.stride = block.channels;
      if (format == MemoryFormat::Contiguous) {
        run_leaf<Forward<T, Plane>>(in.read(), out.data(), count, block, epsilon);
      } else {
        run_leaf<Forward<T, Interleaved>>(in.read(), out.data(), count, block, epsilon);
      }
      out.write();
    });
  });
  return y;
}

Tensor instance_norm_bwd(Tensor x, Tensor grad_y, double epsilon) {
  check_instance_norm(x, epsilon);
  check_floating("instance_norm", "grad_y", grad_y);
  check_like("instance_norm", "grad_y", grad_y, x, x.size(1));
  const MemoryFormat format = format_of(x);
  x = as_format(x, format), grad_y = as_format(grad_y, format);
  Tensor grad_x = empty_in(x, format);
  if (x.numel() == 0) return grad_x;
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const bool direct = x.scalar_type() == scalar_type_of<T> && grad_y.scalar_type() == scalar_type_of<T>;
    for_blocks(x, format, [&](int64_t offset, int64_t count, Block block) {
      BlockBuffer<T> in(Memory::of(x), offset, count, block, direct),
          grad(Memory::of(grad_y), offset, count, block, direct), out(Memory::of(grad_x), offset, count, block, direct);
      if (!direct) block.stride = block.channels;
      if (format == MemoryFormat::Contiguous) {
        run_leaf<Backward<T, Plane>>(in.read(), grad.read(), out.data(), count, block, epsilon);
      } else {
        run_leaf<Backward<T, Interleaved>>(in.read(), grad.read(), out.data(), count, block, epsilon);
      }
      out.write();
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("instance_norm_fwd", TORCH_BOX(&hflow::instance_norm_fwd));
  m.impl("instance_norm_bwd", TORCH_BOX(&hflow::instance_norm_bwd));
}
