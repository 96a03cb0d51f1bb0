// The channel affine y = W x + b of a tile, shared by conv1x1.cpp and flow_step.cpp: up to 32 channels.
//
// A tile is channels × pixels, as rows of pixels in L1: output rows are sums of weighted input rows, which vectorises
// over pixels for any number of channels. Interleaved memory (channels_last) is transposed into that shape and back.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace hflow {

inline constexpr int64_t kGroupPixels =
    2048;  // enough work beside folding a group's partial sums of the weight gradient
inline constexpr int64_t kMaxGroups = 64;

// O output rows: out[o] = Σ_g w[o][g]·x[g] over G input rows, plus `start` or what out already holds.
template <int O, int G, bool Start, class T>
HFLOW_LEAF void add_rows(const T* __restrict x, int64_t x_stride, const T* w, int64_t w_stride, const T* start,
                         T* __restrict out, int64_t out_stride, int64_t n) {
  for (int64_t p = 0; p < n; ++p) {
    T value[O];
    for (int o = 0; o < O; ++o) value[o] = Start ? start[o] : out[o * out_stride + p];
    for (int g = 0; g < G; ++g)
      for (int o = 0; o < O; ++o) value[o] += w[o * w_stride + g] * x[g * x_stride + p];
    for (int o = 0; o < O; ++o) out[o * out_stride + p] = value[o];
  }
}

// y = W x + b for a tile; weight and bias may be a transposed matrix and zeros (backward).
template <class T>
struct Mix {
  template <int O, bool Start>
  HFLOW_LEAF int64_t add_up_to_four(int64_t rows, const T* x, int64_t x_stride, const T* w, int64_t w_stride,
                                    const T* start, T* out, int64_t out_stride, int64_t n) {
    switch (rows) {
      case 1: add_rows<O, 1, Start>(x, x_stride, w, w_stride, start, out, out_stride, n); return 1;
      case 2: add_rows<O, 2, Start>(x, x_stride, w, w_stride, start, out, out_stride, n); return 2;
      case 3: add_rows<O, 3, Start>(x, x_stride, w, w_stride, start, out, out_stride, n); return 3;
      default: add_rows<O, 4, Start>(x, x_stride, w, w_stride, start, out, out_stride, n); return 4;
    }
  }

  template <int O>
  HFLOW_LEAF void outputs(const T* x, int64_t x_stride, const T* w, const T* bias, int64_t channels, T* y,
                          int64_t y_stride, int64_t n) {
    int64_t c = add_up_to_four<O, true>(channels, x, x_stride, w, channels, bias, y, y_stride, n);
    while (c < channels)
      c += add_up_to_four<O, false>(channels - c, x + c * x_stride, x_stride, w + c, channels, bias, y, y_stride, n);
  }

  HFLOW_LEAF void run(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n, int64_t channels,
                      const T* weight, const T* bias) {
    int64_t o = 0;
    for (; o + 2 <= channels; o += 2)
      outputs<2>(x, x_stride, weight + o * channels, bias + o, channels, y + o * y_stride, y_stride, n);
    if (o < channels) outputs<1>(x, x_stride, weight + o * channels, bias + o, channels, y + o * y_stride, y_stride, n);
  }
};

// Sums over pixels stay sums of every 16th pixel until their group of tiles ends: such loops vectorise without
// reassociation.
inline constexpr int64_t kLanes = 16;

// sums[o][c] += Σ g[o]·x[c] over a tile's pixels, lane by lane; then sums[channels][o] += Σ g[o].
template <class T>
struct OuterProduct {
  // Four products share one read of g. Each a, b, … is a register: arrays of arrays would stay in memory.
  HFLOW_LEAF void add_four(const T* g, const T* const (&x)[4], int64_t n, T* const (&sums)[4]) {
    T a[kLanes], b[kLanes], c[kLanes], d[kLanes];
    for (int j = 0; j < kLanes; ++j) a[j] = sums[0][j], b[j] = sums[1][j], c[j] = sums[2][j], d[j] = sums[3][j];
    const T *xa = x[0], *xb = x[1], *xc = x[2], *xd = x[3];
    int64_t p = 0;
    for (; p + kLanes <= n; p += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const T value = g[p + j];
        a[j] += value * xa[p + j], b[j] += value * xb[p + j], c[j] += value * xc[p + j], d[j] += value * xd[p + j];
      }
    }
    for (int j = 0; p < n; ++p, ++j)
      a[j] += g[p] * xa[p], b[j] += g[p] * xb[p], c[j] += g[p] * xc[p], d[j] += g[p] * xd[p];
    for (int j = 0; j < kLanes; ++j) sums[0][j] = a[j], sums[1][j] = b[j], sums[2][j] = c[j], sums[3][j] = d[j];
  }

  HFLOW_LEAF void add(const T* g, int64_t n, T* sums) {
    T a[kLanes];
    for (int j = 0; j < kLanes; ++j) a[j] = sums[j];
    int64_t p = 0;
    for (; p + kLanes <= n; p += kLanes)
      for (int j = 0; j < kLanes; ++j) a[j] += g[p + j];
    for (int j = 0; p < n; ++p, ++j) a[j] += g[p];
    for (int j = 0; j < kLanes; ++j) sums[j] = a[j];
  }

  HFLOW_LEAF void run(const T* g, int64_t g_stride, const T* x, int64_t x_stride, int64_t n, int64_t channels,
                      T* sums) {
    T discarded[kLanes] = {};
    for (int64_t o = 0; o < channels; ++o) {
      for (int64_t c = 0; c < channels; c += 4) {
        // Past the last channel, the last one again: computed and not kept.
        const T* rows[4];
        T* into[4];
        for (int64_t i = 0; i < 4; ++i) {
          rows[i] = x + std::min(c + i, channels - 1) * x_stride;
          into[i] = c + i < channels ? sums + (o * channels + c + i) * kLanes : discarded;
        }
        add_four(g + o * g_stride, rows, n, into);
      }
      add(g + o * g_stride, n, sums + (channels * channels + o) * kLanes);
    }
  }
};

// How memory splits into tiles of about `elements`: `samples` blocks of `pixels`, with the strides between channels and
// between pixels. `merge` lets tiles span samples where all pixels lie side by side.
struct Tiling {
  int64_t channels, samples, pixels, channel_stride, pixel_stride, tile;

  Tiling(const Tensor& x, MemoryFormat format, int64_t elements, bool merge)
      : channels(x.size(1)), samples(x.size(0)), pixels(pixels_of(x)) {
    const bool interleaved = format == MemoryFormat::ChannelsLast || pixels == 1;
    if (interleaved && (merge || pixels == 1)) pixels *= samples, samples = 1;
    channel_stride = interleaved ? 1 : pixels;
    pixel_stride = interleaved ? channels : 1;
    tile = elements / channels / 64 * 64;
  }

  int64_t tiles_per_sample() const { return (pixels + tile - 1) / tile; }
  int64_t tiles() const { return samples * tiles_per_sample(); }
  int64_t groups() const {
    return std::max<int64_t>(1, std::min({tiles(), samples * pixels / kGroupPixels, kMaxGroups}));
  }

  // f(group) for every group, on threads.
  template <class F>
  void for_groups(const F& f) const {
    parallel_units(groups(), std::min(tile, pixels) * channels * (tiles() / groups()), f);
  }

  // f(offset, pixels) for the tiles of a group.
  template <class F>
  void for_tiles(int64_t group, const F& f) const {
    const int64_t end = (group + 1) * tiles() / groups();
    for (int64_t t = group * tiles() / groups(); t < end; ++t) {
      const int64_t first = t % tiles_per_sample() * tile;
      f(t / tiles_per_sample() * channels * pixels + first * pixel_stride, std::min(tile, pixels - first));
    }
  }

  Runs runs(int64_t n) const { return {channels, n, channel_stride, pixel_stride, tile}; }
};

// The rows of a tile: memory itself where it already has their type and shape, else a buffer.
template <class T>
struct Tile {
  T* rows;
  int64_t stride;

  Tile(const Tiling& tiling, Memory memory, int64_t offset, T* buffer) : rows(buffer), stride(tiling.tile) {
    if (memory.type != scalar_type_of<T> || tiling.pixel_stride != 1) return;
    rows = static_cast<T*>(memory.data) + offset;
    stride = tiling.channel_stride;
  }

  static Tile load(const Tiling& tiling, Memory from, int64_t offset, int64_t n, T* buffer) {
    const Tile tile(tiling, from, offset, buffer);
    if (tile.rows == buffer) gather(from, offset, buffer, tiling.runs(n));
    return tile;
  }

  void store(const Tiling& tiling, Memory to, int64_t offset, int64_t n, const T* buffer) const {
    if (rows == buffer) scatter(buffer, to, offset, tiling.runs(n));
  }
};

// The gradients of weight and bias: per group 16 lanes for every sum, folded when the group ends, groups added in
// order.
template <class T>
class GroupSums {
 public:
  GroupSums(const Tiling& tiling)
      : groups_(tiling.groups()),
        size_(tiling.channels * tiling.channels + tiling.channels),
        partial_(groups_ * size_) {}

  std::vector<T> lanes() const { return std::vector<T>(size_ * kLanes); }

  void fold(int64_t group, const std::vector<T>& lanes) {
    for (int64_t i = 0; i < size_; ++i) {
      const auto first = lanes.begin() + i * kLanes;
      partial_[group * size_ + i] = std::accumulate(first, first + kLanes, 0.0);
    }
  }

  // grad_weight by rows, then grad_bias.
  std::vector<double> total() const {
    std::vector<double> total(size_);
    for (int64_t group = 0; group < groups_; ++group)
      for (int64_t i = 0; i < size_; ++i) total[i] += partial_[group * size_ + i];
    return total;
  }

 private:
  int64_t groups_, size_;
  std::vector<double> partial_;
};

// The matrix as T, by rows or (transposed) by columns.
template <class T>
inline std::vector<T> matrix_of(const Tensor& weight, bool transposed) {
  const int64_t channels = weight.size(0);
  std::vector<T> matrix(channels * channels);
  const Runs runs{channels, channels, transposed ? 1 : channels, transposed ? channels : 1, channels};
  gather(Memory::of(weight), 0, matrix.data(), runs);
  return matrix;
}

}  // namespace hflow
