// The channel affine y = W x + b of a tile, shared by conv1x1.cpp and flow_step.cpp: up to 32 channels.
//
// A tile is channels × pixels, as rows of pixels in L1: every output row is a sum of weighted input rows, which vectorises
// over pixels for any number of channels. Channels_last tiles are transposed into that shape and back.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace hflow {

inline constexpr int64_t kMaxMixChannels = 32;
inline constexpr int64_t kMaxGroups = 64;  // of tiles: the units of work, and of the weight gradient's partial sums

// out = Σ_g w[g]·x[g], plus `start` or what out already holds.
template <int G, bool Start, class T>
HFLOW_LEAF void add_rows(const T* __restrict x, int64_t stride, const T* w, T start, T* __restrict out, int64_t n) {
  for (int64_t p = 0; p < n; ++p) {
    T value = Start ? start : out[p];
    for (int g = 0; g < G; ++g) value += w[g] * x[g * stride + p];
    out[p] = value;
  }
}

template <bool Start, class T>
HFLOW_LEAF int64_t add_up_to_four_rows(int64_t rows, const T* x, int64_t stride, const T* w, T start, T* out, int64_t n) {
  switch (rows) {
    case 1: add_rows<1, Start>(x, stride, w, start, out, n); return 1;
    case 2: add_rows<2, Start>(x, stride, w, start, out, n); return 2;
    case 3: add_rows<3, Start>(x, stride, w, start, out, n); return 3;
    default: add_rows<4, Start>(x, stride, w, start, out, n); return 4;
  }
}

// y = W x + b for a tile; weight and bias may be a transposed matrix and zeros (backward).
template <class T>
struct Mix {
  HFLOW_LEAF void run(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n, int64_t channels, const T* weight,
                      const T* bias) {
    for (int64_t o = 0; o < channels; ++o) {
      const T* w = weight + o * channels;
      int64_t c = add_up_to_four_rows<true>(channels, x, x_stride, w, bias[o], y + o * y_stride, n);
      while (c < channels)
        c += add_up_to_four_rows<false>(channels - c, x + c * x_stride, x_stride, w + c, T(0), y + o * y_stride, n);
    }
  }
};

// grad_weight += g xᵀ and grad_bias += Σ g over a tile. Sums keep 64 lanes, folded pairwise: vectorisable and accurate.
template <class T>
struct OuterProduct {
  HFLOW_LEAF double fold(T* lanes) {
    for (int width = 32; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    return static_cast<double>(lanes[0]);
  }

  HFLOW_LEAF double dot(const T* a, const T* b, int64_t n) {
    T lanes[64] = {};
    int64_t p = 0;
    for (; p + 64 <= n; p += 64)
      for (int j = 0; j < 64; ++j) lanes[j] += a[p + j] * b[p + j];
    for (int j = 0; p < n; ++p, ++j) lanes[j] += a[p] * b[p];
    return fold(lanes);
  }

  HFLOW_LEAF double sum(const T* a, int64_t n) {
    T lanes[64] = {};
    int64_t p = 0;
    for (; p + 64 <= n; p += 64)
      for (int j = 0; j < 64; ++j) lanes[j] += a[p + j];
    for (int j = 0; p < n; ++p, ++j) lanes[j] += a[p];
    return fold(lanes);
  }

  HFLOW_LEAF void run(const T* g, int64_t g_stride, const T* x, int64_t x_stride, int64_t n, int64_t channels,
                      double* grad_weight, double* grad_bias) {
    for (int64_t o = 0; o < channels; ++o) {
      grad_bias[o] += sum(g + o * g_stride, n);
      for (int64_t c = 0; c < channels; ++c) grad_weight[o * channels + c] += dot(g + o * g_stride, x + c * x_stride, n);
    }
  }
};

// How memory splits into tiles of about `elements`: `samples` blocks of `pixels`, with the strides between channels and
// between pixels.
struct Tiling {
  int64_t channels, samples, pixels, channel_stride, pixel_stride, tile;

  Tiling(const Tensor& x, MemoryFormat format, int64_t elements)
      : channels(x.size(1)), samples(x.size(0)), pixels(pixels_of(x)) {
    const bool interleaved = format == MemoryFormat::ChannelsLast || pixels == 1;
    if (pixels == 1) pixels = samples, samples = 1;  // single pixels, with all their channels side by side, form one block
    channel_stride = interleaved ? 1 : pixels;
    pixel_stride = interleaved ? channels : 1;
    tile = std::max<int64_t>(elements / channels / 64, 1) * 64;
  }

  int64_t tiles_per_sample() const { return (pixels + tile - 1) / tile; }
  int64_t tiles() const { return samples * tiles_per_sample(); }
  int64_t groups() const { return std::min(tiles(), kMaxGroups); }

  // f(group, offset, pixels) for every tile, groups on threads.
  template <class F>
  void for_tiles(const F& f) const {
    const int64_t cost = std::min(tile, pixels) * channels * (tiles() / groups());
    parallel_units(groups(), cost, [&](int64_t group) {
      const int64_t end = (group + 1) * tiles() / groups();
      for (int64_t t = group * tiles() / groups(); t < end; ++t) {
        const int64_t first = t % tiles_per_sample() * tile;
        f(group, t / tiles_per_sample() * channels * pixels + first * pixel_stride, std::min(tile, pixels - first));
      }
    });
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
