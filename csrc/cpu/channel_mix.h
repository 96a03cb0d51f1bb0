// The channel affine y = W x + b of a tile, shared by conv1x1.cpp and flow_step.cpp: up to 32 channels.
//
// A tile is channels × pixels, as rows of pixels in L1: output rows are sums of weighted input rows, which vectorises
// over pixels for any number of channels. Interleaved memory (channels_last) is transposed into that shape and back.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace hflow {

inline constexpr int64_t kGroupPixels =
    2048;  // enough work beside folding a group's partial sums of the weight gradient
inline constexpr int64_t kMaxGroups = 64;

// A matrix product in registers: y = W x + b for a tile, where weight and bias may be a transposed matrix and zeros
// (backward). A block of up to 6 output rows by two vectors of pixels stays in registers over all input rows: 12 sums,
// which hide the latency of multiply-add, beside two vectors of x and one weight, fill the 16 registers of AVX2.
template <class T>
struct Mix {
  static constexpr int kRows = 6;

  template <int Bytes>
  struct Wide {
    typedef T Vector __attribute__((vector_size(Bytes)));
    static constexpr int64_t kWidth = Bytes / sizeof(T);

    // O output rows × Count vectors V of pixels.
    template <int O, int Count, class V>
    HFLOW_LEAF void block(const T* x, int64_t x_stride, const T* w, const T* bias, int64_t channels, T* y,
                          int64_t y_stride) {
      V sums[O][Count];
#pragma GCC unroll 6
      for (int o = 0; o < O; ++o)
#pragma GCC unroll 2
        for (int v = 0; v < Count; ++v) sums[o][v] = V{} + bias[o];
      for (int64_t c = 0; c < channels; ++c, x += x_stride) {
        V in[Count];
#pragma GCC unroll 2
        for (int v = 0; v < Count; ++v) std::memcpy(&in[v], x + v * (sizeof(V) / sizeof(T)), sizeof(V));
#pragma GCC unroll 6
        for (int o = 0; o < O; ++o)
#pragma GCC unroll 2
          for (int v = 0; v < Count; ++v) sums[o][v] += w[o * channels + c] * in[v];
      }
#pragma GCC unroll 6
      for (int o = 0; o < O; ++o)
#pragma GCC unroll 2
        for (int v = 0; v < Count; ++v)
          std::memcpy(y + o * y_stride + v * (sizeof(V) / sizeof(T)), &sums[o][v], sizeof(V));
    }

    template <int O>
    HFLOW_LEAF void rows(const T* x, int64_t x_stride, const T* w, const T* bias, int64_t channels, T* y,
                         int64_t y_stride, int64_t n) {
      int64_t p = 0;
      for (; p + 2 * kWidth <= n; p += 2 * kWidth)
        block<O, 2, Vector>(x + p, x_stride, w, bias, channels, y + p, y_stride);
      for (; p + kWidth <= n; p += kWidth)
        block<O, 1, Vector>(x + p, x_stride, w, bias, channels, y + p, y_stride);
      for (; p < n; ++p) block<O, 1, T>(x + p, x_stride, w, bias, channels, y + p, y_stride);
    }

    HFLOW_LEAF void run(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n, int64_t channels,
                        const T* weight, const T* bias) {
      const int64_t blocks = (channels + kRows - 1) / kRows;  // of nearly the same size
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t o = b * channels / blocks, count = (b + 1) * channels / blocks - o;
        const T *w = weight + o * channels, *start = bias + o;
        T* out = y + o * y_stride;
        switch (count) {
          case 1: rows<1>(x, x_stride, w, start, channels, out, y_stride, n); break;
          case 2: rows<2>(x, x_stride, w, start, channels, out, y_stride, n); break;
          case 3: rows<3>(x, x_stride, w, start, channels, out, y_stride, n); break;
          case 4: rows<4>(x, x_stride, w, start, channels, out, y_stride, n); break;
          case 5: rows<5>(x, x_stride, w, start, channels, out, y_stride, n); break;
          default: rows<6>(x, x_stride, w, start, channels, out, y_stride, n);
        }
      }
    }
  };
};

template <class T, class... Args>
inline void mix(Args... args) {
  run_wide_leaf<Mix<T>::template Wide>(args...);
}

// Sums over pixels stay sums of every 16th pixel, or every 8th or 4th where vectors are shorter, until their group of
// tiles ends: such loops vectorise without reassociation.
inline constexpr int64_t kLanes = 16;

// sums[o][c] += Σ g[o]·x[c] over a tile's pixels, lane by lane; then sums[channels][o] += Σ g[o]. Products of up to
// 4 × 3 rows stay in registers over all pixels: 12 sums, beside at most 4 vectors of rows.
template <class T>
struct OuterProduct {
  static constexpr int kRows = 4, kColumns = 3;

  template <int Bytes>
  struct Wide {
    typedef T Vector __attribute__((vector_size(Bytes)));
    static constexpr int64_t kWidth = Bytes / sizeof(T);
    static_assert(kWidth <= kLanes);

    template <int O, int C>
    HFLOW_LEAF void block(const T* g, int64_t g_stride, const T* x, int64_t x_stride, int64_t n, int64_t channels,
                          T* sums) {
      Vector total[O][C];
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) std::memcpy(&total[o][c], sums + (o * channels + c) * kLanes, Bytes);
      int64_t p = 0;
      for (; p + kWidth <= n; p += kWidth) {
        Vector in[C];
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) std::memcpy(&in[c], x + c * x_stride + p, Bytes);
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) {
          Vector gradient;
          std::memcpy(&gradient, g + o * g_stride + p, Bytes);
#pragma GCC unroll 3
          for (int c = 0; c < C; ++c) total[o][c] += gradient * in[c];
        }
      }
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) std::memcpy(sums + (o * channels + c) * kLanes, &total[o][c], Bytes);
      for (int j = 0; p < n; ++p, ++j)
        for (int o = 0; o < O; ++o)
          for (int c = 0; c < C; ++c)
            sums[(o * channels + c) * kLanes + j] += g[o * g_stride + p] * x[c * x_stride + p];
    }

    template <int O>
    HFLOW_LEAF void rows(const T* g, int64_t g_stride, const T* x, int64_t x_stride, int64_t n, int64_t channels,
                         T* sums) {
      const int64_t blocks = (channels + kColumns - 1) / kColumns;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t c = b * channels / blocks;
        const T* columns = x + c * x_stride;
        T* into = sums + c * kLanes;
        switch ((b + 1) * channels / blocks - c) {
          case 1: block<O, 1>(g, g_stride, columns, x_stride, n, channels, into); break;
          case 2: block<O, 2>(g, g_stride, columns, x_stride, n, channels, into); break;
          default: block<O, 3>(g, g_stride, columns, x_stride, n, channels, into);
        }
      }
    }

    HFLOW_LEAF void add(const T* g, int64_t n, T* sums) {
      T total[kLanes];
      for (int j = 0; j < kLanes; ++j) total[j] = sums[j];
      int64_t p = 0;
      for (; p + kLanes <= n; p += kLanes)
        for (int j = 0; j < kLanes; ++j) total[j] += g[p + j];
      for (int j = 0; p < n; ++p, ++j) total[j] += g[p];
      for (int j = 0; j < kLanes; ++j) sums[j] = total[j];
    }

    HFLOW_LEAF void run(const T* g, int64_t g_stride, const T* x, int64_t x_stride, int64_t n, int64_t channels,
                        T* sums) {
      const int64_t blocks = (channels + kRows - 1) / kRows;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t o = b * channels / blocks;
        const T* gradients = g + o * g_stride;
        T* into = sums + o * channels * kLanes;
        switch ((b + 1) * channels / blocks - o) {
          case 1: rows<1>(gradients, g_stride, x, x_stride, n, channels, into); break;
          case 2: rows<2>(gradients, g_stride, x, x_stride, n, channels, into); break;
          case 3: rows<3>(gradients, g_stride, x, x_stride, n, channels, into); break;
          default: rows<4>(gradients, g_stride, x, x_stride, n, channels, into);
        }
      }
      for (int64_t o = 0; o < channels; ++o) add(g + o * g_stride, n, sums + (channels * channels + o) * kLanes);
    }
  };
};

template <class T, class... Args>
inline void add_outer_product(Args... args) {
  run_wide_leaf<OuterProduct<T>::template Wide>(args...);
}

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
      double sums[4] = {};  // four chains of additions rather than one
      for (int64_t j = 0; j < kLanes; ++j) sums[j % 4] += static_cast<double>(lanes[i * kLanes + j]);
      partial_[group * size_ + i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
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
