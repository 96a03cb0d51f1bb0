// instance_norm on the CPU: (x − mean)/√(var + ε) per channel of a sample, and backward.
//
// Threads: about 16 Ki elements: some planes (contiguous), or a block of a sample's channels (channels_last), so that no
// sum crosses threads. Bytes: from memory one read and one write of x forward, two reads and one write backward; a unit
// is read three times (mean, moments, result), the last two from the cache. A single pixel's channels count as a plane.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"
#include "network_formulas.h"

namespace hflow {
namespace {

constexpr int64_t kUnit = 16384;             // elements of small planes per unit of work
constexpr int64_t kLanes = 64;               // sums that run side by side: they hide the latency of addition
constexpr int64_t kRowsPerSum = 64;          // rows added in T before a sum goes on in double
constexpr int64_t kLine = 16;                // blocks have multiples of these channels: units share no cache line
constexpr int64_t kBlockElements = 1 << 17;  // of a block of channels, which stays in L2

// What is normalised at once: `channels` ≤ kLanes side by side, in `pixels` pixels `stride` elements apart.
struct Block {
  int64_t channels, pixels, stride;
};

// A block as rows of lanes: pixels that lie side by side share a row, a power of two of them.
struct Lanes {
  int64_t channels, lanes, stride, rows, last;  // lanes per row, of the last row too

  HFLOW_LEAF Lanes of(const Block& block) {
    int64_t repeats = 1;
    while (block.stride == block.channels && 2 * repeats * block.channels <= kLanes) repeats *= 2;
    const int64_t rows = (block.pixels + repeats - 1) / repeats, rest = block.pixels - (rows - 1) * repeats;
    return {block.channels, repeats * block.channels, repeats * block.stride, rows, rest * block.channels};
  }

  HFLOW_HD int64_t length(int64_t row) const { return row + 1 < rows ? lanes : last; }

  // The values of the channels, repeated over the lanes.
  template <class T>
  HFLOW_HD void repeat(T* values) const {
    for (int64_t l = channels; l < lanes; ++l) values[l] = values[l - channels];
  }

  // sums[q][c] over all pixels of channel c; term(offset, length, totals) adds a row to the totals of its lanes.
  template <class T, int Count, class Term>
  HFLOW_HD void sum(const Term& term, double (&sums)[Count][kLanes]) const {
    for (int q = 0; q < Count; ++q) std::fill_n(sums[q], lanes, 0.0);
    for (int64_t begin = 0; begin < rows; begin += kRowsPerSum) {
      alignas(64) T totals[Count][kLanes] = {};
      for (int64_t r = begin; r < std::min(begin + kRowsPerSum, rows); ++r) term(r * stride, length(r), totals);
      for (int q = 0; q < Count; ++q)
        for (int64_t l = 0; l < lanes; ++l) sums[q][l] += static_cast<double>(totals[q][l]);
    }
    for (int q = 0; q < Count; ++q)
      for (int64_t width = lanes / 2; width >= channels; width /= 2)
        for (int64_t l = 0; l < width; ++l) sums[q][l] += sums[q][l + width];
  }
};

template <class T>
struct AddValues {
  const T* x;

  HFLOW_HD void operator()(int64_t offset, int64_t n, T (&totals)[1][kLanes]) const {
#pragma GCC ivdep
    for (int64_t l = 0; l < n; ++l) totals[0][l] += x[offset + l];
  }
};

template <class T>
struct AddMoments {
  const T *x, *center;

  HFLOW_HD void operator()(int64_t offset, int64_t n, T (&totals)[2][kLanes]) const {
#pragma GCC ivdep
    for (int64_t l = 0; l < n; ++l) {
      const T d = x[offset + l] - center[l];
      totals[0][l] += d;
      totals[1][l] += d * d;
    }
  }
};

template <class T>
struct AddGradients {
  const T *x, *center, *grad;

  HFLOW_HD void operator()(int64_t offset, int64_t n, T (&totals)[4][kLanes]) const {
#pragma GCC ivdep
    for (int64_t l = 0; l < n; ++l) {
      const T d = x[offset + l] - center[l], g = grad[offset + l];
      totals[0][l] += d;
      totals[1][l] += d * d;
      totals[2][l] += g;
      totals[3][l] += g * d;
    }
  }
};

// The mean of every lane's channel, as far as T holds it.
template <class T>
HFLOW_LEAF void find_centers(const Lanes& lanes, const T* x, double n, T (&center)[kLanes]) {
  double sums[1][kLanes];
  lanes.sum<T>(AddValues<T>{x}, sums);
  for (int64_t c = 0; c < lanes.channels; ++c) center[c] = static_cast<T>(sums[0][c] / n);
  lanes.repeat(center);
}

// `count` blocks, `distance` elements apart.
template <class T>
struct Forward {
  HFLOW_LEAF void run(const T* x, T* y, int64_t count, int64_t distance, Block block, double epsilon) {
    const Lanes lanes = Lanes::of(block);
    const double n = static_cast<double>(block.pixels);
    for (int64_t b = 0; b < count; ++b, x += distance, y += distance) {
      alignas(64) T center[kLanes], scale[kLanes], shift[kLanes];
      find_centers(lanes, x, n, center);
      double sums[2][kLanes];
      lanes.sum<T>(AddMoments<T>{x, center}, sums);
      for (int64_t c = 0; c < lanes.channels; ++c) {
        const InstanceNorm norm(n, sums[0][c], sums[1][c], epsilon);
        scale[c] = static_cast<T>(norm.scale()), shift[c] = static_cast<T>(norm.shift());
      }
      lanes.repeat(scale), lanes.repeat(shift);
      for (int64_t r = 0; r < lanes.rows; ++r) {
        const int64_t offset = r * lanes.stride, length = lanes.length(r);
#pragma GCC ivdep
        for (int64_t l = 0; l < length; ++l) y[offset + l] = (x[offset + l] - center[l]) * scale[l] + shift[l];
      }
    }
  }
};

template <class T>
struct Backward {
  HFLOW_LEAF void run(const T* x, const T* grad_y, T* grad_x, int64_t count, int64_t distance, Block block,
                      double epsilon) {
    const Lanes lanes = Lanes::of(block);
    const double n = static_cast<double>(block.pixels);
    for (int64_t b = 0; b < count; ++b, x += distance, grad_y += distance, grad_x += distance) {
      alignas(64) T center[kLanes], of_grad[kLanes], of_d[kLanes], constant[kLanes];
      find_centers(lanes, x, n, center);
      double sums[4][kLanes];
      lanes.sum<T>(AddGradients<T>{x, center, grad_y}, sums);
      for (int64_t c = 0; c < lanes.channels; ++c) {
        const InstanceNorm norm(n, sums[0][c], sums[1][c], epsilon);
        const InstanceNormGradient gradient(norm, sums[2][c], sums[3][c]);
        of_grad[c] = static_cast<T>(gradient.of_grad), of_d[c] = static_cast<T>(gradient.of_d);
        constant[c] = static_cast<T>(gradient.constant);
      }
      lanes.repeat(of_grad), lanes.repeat(of_d), lanes.repeat(constant);
      for (int64_t r = 0; r < lanes.rows; ++r) {
        const int64_t offset = r * lanes.stride, length = lanes.length(r);
#pragma GCC ivdep
        for (int64_t l = 0; l < length; ++l) {
          const int64_t i = offset + l;
          grad_x[i] = of_grad[l] * grad_y[i] + (of_d[l] * (x[i] - center[l]) + constant[l]);
        }
      }
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

void check(const Tensor& x, double epsilon) {
  check_flow_variable("instance_norm", "x", x);
  if ((pixels_of(x) == 1 ? x.size(1) : pixels_of(x)) == 1)
    fail("instance_norm", "x must have more than one pixel, or more than one channel of a single pixel, got ",
         shape_of(x));
  if (!(epsilon > 0)) fail("instance_norm", "epsilon must be above 0, got ", epsilon);
}

Tensor instance_norm_fwd(Tensor x, double epsilon) {
  check(x, epsilon);
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
      run_leaf<Forward<T>>(in.read(), out.data(), count, block.pixels, block, epsilon);
      out.write();
    });
  });
  return y;
}

Tensor instance_norm_bwd(Tensor x, Tensor grad_y, double epsilon) {
  check(x, epsilon);
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
      run_leaf<Backward<T>>(in.read(), grad.read(), out.data(), count, block.pixels, block, epsilon);
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
