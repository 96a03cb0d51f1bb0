// A tile of pixels with all their channels in shared memory, for the ops that mix channels: channel_mix.cuh and
// channel_sums.cuh, up to 32 channels. Free of torch.
//
// Memory and tile exchange elements in the order of memory, 16 bytes per access where pointers and sizes allow, else one
// element per lane; in the tile they lie as rows of pixels, where both memory formats look alike. So every element of
// device memory is touched once. Tiles depend on the shape alone.
#pragma once

#include <algorithm>

#include "common/divisor.h"
#include "cuda/device.cuh"

namespace hflow::cuda {

constexpr int kMixThreads = 128;
constexpr int kMixOutputs = 8;  // output channels per thread

template <class S>
using ComputeType = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Pixels per thread. Tiles of 16 KiB: two of them and the matrix leave room for several blocks on every target.
template <class T>
inline constexpr int kMixPixels = 16 / static_cast<int>(sizeof(T));

struct MixShape {
  int64_t samples;
  int channels;
  int64_t pixels;
  bool by_rows;  // contiguous, and more than one pixel

  __host__ __device__ int64_t total() const { return samples * channels * pixels; }
};

// What a tile holds: `pixels` pixels, from one pixel of a sample on, or whole samples from that one on.
struct TileSpan {
  int64_t sample, pixel;
  int pixels;
};

// How the pixels split into tiles: several samples per tile, or several tiles per sample.
struct MixTiling {
  static constexpr int kGranule = 8;  // tiles start at multiples of so many pixels, which keeps vectors aligned

  MixShape shape;
  int size;      // channels, rounded up to 8, 16 or 32
  int capacity, capacity_shift;  // pixels that a tile has room for: a power of two
  int samples_per_tile;
  int64_t tiles_per_sample, piece;  // a piece of a sample, in pixels
  bool wide;                        // memory is accessed in vectors of 16 bytes
  Divisor channels, pixels;

  // `merge`: in channels_last, pixels of different samples are alike.
  template <class S>
  static MixTiling of(MixShape shape, bool merge, bool is_aligned) {
    if (merge && !shape.by_rows) shape.pixels *= shape.samples, shape.samples = 1;
    return MixTiling(shape, kMixPixels<ComputeType<S>>, kVector<S>, is_aligned);
  }

  __host__ __device__ int64_t tiles() const {
    return samples_per_tile > 1 ? ceil_div(shape.samples, samples_per_tile) : shape.samples * tiles_per_sample;
  }

  __device__ TileSpan span(int64_t tile) const {
    if (samples_per_tile > 1) {
      const int64_t sample = tile * samples_per_tile;
      const int64_t samples = min(static_cast<int64_t>(samples_per_tile), shape.samples - sample);
      return {sample, 0, static_cast<int>(samples * shape.pixels)};
    }
    const int64_t sample = tile / tiles_per_sample, pixel = (tile - sample * tiles_per_sample) * piece;
    return {sample, pixel, static_cast<int>(min(piece, shape.pixels - pixel))};
  }

  // Neighbouring threads take neighbouring pixels; a warp's threads share their output channels.
  __device__ int pixel_lanes() const { return kMixThreads * kMixOutputs / size; }
  __device__ int first_output() const { return static_cast<int>(threadIdx.x) / pixel_lanes() * kMixOutputs; }
  __device__ int first_pixel() const { return static_cast<int>(threadIdx.x) % pixel_lanes(); }

 private:
  MixTiling(const MixShape& shape, int thread_pixels, int vector, bool is_aligned)
      : shape(shape),
        size(shape.channels <= 8 ? 8 : shape.channels <= 16 ? 16 : 32),
        capacity(kMixThreads * kMixOutputs / size * thread_pixels),
        capacity_shift(0),
        samples_per_tile(1),
        tiles_per_sample(1),
        piece(shape.pixels),
        channels(shape.channels),
        pixels(shape.pixels) {
    while (1 << capacity_shift < capacity) ++capacity_shift;
    if (shape.pixels > 0 && shape.pixels <= capacity / 2) {
      samples_per_tile = static_cast<int>(capacity / shape.pixels);
      if (samples_per_tile > kGranule) samples_per_tile = samples_per_tile / kGranule * kGranule;
    } else {  // pieces of about the same length
      tiles_per_sample = ceil_div(shape.pixels, capacity);
      piece = std::min<int64_t>(capacity, ceil_div(ceil_div(shape.pixels, std::max<int64_t>(tiles_per_sample, 1)),
                                                   kGranule) * kGranule);
      tiles_per_sample = ceil_div(shape.pixels, std::max<int64_t>(piece, 1));
    }
    const int64_t sample = shape.pixels * (shape.by_rows ? 1 : shape.channels);
    wide = is_aligned && ((!shape.by_rows && shape.samples == 1) ||
                          sample * (shape.by_rows ? 1 : samples_per_tile) % vector == 0);
  }
};

// Some neighbouring elements of memory, all of a vector: where the first one lies, and how many of them exist.
struct TilePlace {
  int channel, pixel, count;     // in the tile
  int64_t sample, sample_pixel;  // pixel sample_pixel of that sample
};

// The memory formats: what a vector of the tile holds, and where that lies in a tensor.
struct MixRows {
  static constexpr int kPadding = 4;            // of a row in shared memory, where its vectors stay aligned
  static constexpr bool kWholeVectors = true;  // all of a vector's elements exist, or none

  // Vector i of V elements: neighbouring pixels of a channel.
  template <int V>
  __device__ static TilePlace place(const MixTiling& tiling, const TileSpan& span, int i) {
    const int channel = i * V >> tiling.capacity_shift, pixel = i * V & (tiling.capacity - 1);
    const int count = max(0, min(V, span.pixels - pixel));
    if (tiling.samples_per_tile == 1) return {channel, pixel, count, span.sample, span.pixel + pixel};
    const int64_t sample = tiling.pixels.divide(pixel);
    return {channel, pixel, count, span.sample + sample, pixel - sample * tiling.shape.pixels};
  }

  __device__ static void advance(const MixTiling&, TilePlace& place) { ++place.pixel, ++place.sample_pixel; }

  // A channel at the pixel of `place`, in a tensor of `channels` channels.
  __device__ static int64_t offset(const MixTiling& tiling, const TilePlace& place, int64_t channels, int64_t channel) {
    return (place.sample * channels + channel) * tiling.shape.pixels + place.sample_pixel;
  }

  // Row i of those that a group of threads sums up: chosen so that the groups of a warp read different banks.
  template <int Rows>
  __device__ static int summand(int group, int groups, int i) {
    return group + groups * i;
  }
};

struct MixPixels {
  static constexpr int kPadding = 1;  // the channels of a pixel lie in different banks
  static constexpr bool kWholeVectors = false;

  // Neighbouring channels, then those of the next pixel.
  template <int V>
  __device__ static TilePlace place(const MixTiling& tiling, const TileSpan& span, int i) {
    const int pixel = static_cast<int>(tiling.channels.divide(i * V)), channel = i * V - pixel * tiling.shape.channels;
    const int count = max(0, min(V, span.pixels * tiling.shape.channels - i * V));
    if (tiling.samples_per_tile == 1) return {channel, pixel, count, span.sample, span.pixel + pixel};
    const int64_t sample = tiling.pixels.divide(pixel);
    return {channel, pixel, count, span.sample + sample, pixel - sample * tiling.shape.pixels};
  }

  __device__ static void advance(const MixTiling& tiling, TilePlace& place) {
    if (++place.channel < tiling.shape.channels) return;
    place.channel = 0, ++place.pixel;
    if (++place.sample_pixel == tiling.shape.pixels) place.sample_pixel = 0, ++place.sample;
  }

  __device__ static int64_t offset(const MixTiling& tiling, const TilePlace& place, int64_t channels, int64_t channel) {
    return (place.sample * tiling.shape.pixels + place.sample_pixel) * channels + channel;
  }

  template <int Rows>
  __device__ static int summand(int group, int, int i) {
    return group * Rows + i;
  }
};

// Shared memory: the matrix, one row per input channel and padded to `size` columns; the bias; then tiles of `channels`
// rows of pixels.
template <class Format, class T>
class MixMemory {
 public:
  __device__ explicit MixMemory(const MixTiling& tiling)
      : memory_(dynamic_shared<T>()), tiling_(tiling), stride_(tiling.capacity + Format::kPadding) {}

  static int bytes(const MixTiling& tiling, int tiles) {
    const int rows = tiles * tiling.shape.channels * (tiling.capacity + Format::kPadding);
    return static_cast<int>(sizeof(T)) * ((tiling.shape.channels + 1) * tiling.size + rows);
  }

  __device__ int row(int tile, int channel) const {
    return (tiling_.shape.channels + 1) * tiling_.size + (tile * tiling_.shape.channels + channel) * stride_;
  }
  __device__ DynamicShared<T> operator*() const { return memory_; }

  // The matrix from `weight`, or its transpose, and the bias or zeros.
  __device__ void fill(const T* weight, bool transpose, const T* bias) const {
    const int channels = tiling_.shape.channels, size = tiling_.size;
    for (int i = threadIdx.x; i < (channels + 1) * size; i += kMixThreads) {
      const int row = i / size, column = i - row * size;
      const T* from = row == channels ? bias : weight;
      const int at = row == channels ? column : transpose ? column * channels + row : row * channels + column;
      memory_[i] = column < channels && from != nullptr ? from[at] : T(0);
    }
  }

  // The elements of a vector in a tile.
  template <int V>
  __device__ void put(int tile, TilePlace place, const T (&values)[V]) const {
    constexpr int N = V > 1 ? kVector<T> : 1;
    if constexpr (std::is_same_v<Format, MixRows>) {
      const int first = row(tile, place.channel) + place.pixel;
#pragma unroll
      for (int k = 0; k < V; k += N) {
        T part[N];
#pragma unroll
        for (int i = 0; i < N; ++i) part[i] = values[k + i];
        memory_.store(first + k, part);
      }
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k, Format::advance(tiling_, place))
        memory_[row(tile, place.channel) + place.pixel] = values[k];
    }
  }
  template <int V>
  __device__ void get(int tile, TilePlace place, T (&values)[V]) const {
    constexpr int N = V > 1 ? kVector<T> : 1;
    if constexpr (std::is_same_v<Format, MixRows>) {
      const int first = row(tile, place.channel) + place.pixel;
#pragma unroll
      for (int k = 0; k < V; k += N) {
        T part[N];
        memory_.load(first + k, part);
#pragma unroll
        for (int i = 0; i < N; ++i) values[k + i] = part[i];
      }
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k, Format::advance(tiling_, place))
        values[k] = memory_[row(tile, place.channel) + place.pixel];
    }
  }

 private:
  DynamicShared<T> memory_;
  const MixTiling& tiling_;
  int stride_;
};

template <int V>
__device__ int mix_vectors(const MixTiling& tiling) {
  return tiling.shape.channels * tiling.capacity / V;
}

// The first `count` elements of a vector as they are, zeros for the others.
template <class Format, int V, class S>
__device__ __forceinline__ void mix_read(const S* from, int count, S (&packed)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) packed[k] = to_memory<S>(ComputeType<S>(0));
  if (count == V) {
    load_packed<V>(from, packed);
  } else if (V > 1 && !Format::kWholeVectors) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (k < count) packed[k] = from[k];
  }
}

template <int V, class S, class T>
__device__ __forceinline__ void mix_unpack(const S (&packed)[V], T (&values)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) values[k] = to_compute<T>(packed[k]);
}

template <class Format, int V, class S, class T>
__device__ __forceinline__ void mix_write(const T (&values)[V], int count, S* to) {
  S packed[V];
#pragma unroll
  for (int k = 0; k < V; ++k) packed[k] = to_memory<S>(values[k]);
  if (count == V) {
    store_packed<V>(packed, to);
  } else if (V > 1 && !Format::kWholeVectors) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (k < count) to[k] = packed[k];
  }
}

// From memory into a tile; zeros beyond the last pixel.
template <int V, class Format, class S, class T>
__device__ void mix_load(const S* from, const MixTiling& tiling, const TileSpan& span,
                         const MixMemory<Format, T>& memory, int tile) {
  constexpr int kAtOnce = V == 1 ? 8 : 4;  // loads under way before the first is waited for
#pragma unroll 1
  for (int first = threadIdx.x; first < mix_vectors<V>(tiling); first += kAtOnce * kMixThreads) {
    S packed[kAtOnce][V];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kMixThreads;
      const TilePlace place = Format::template place<V>(tiling, span, i);
      mix_read<Format>(from + Format::offset(tiling, place, tiling.shape.channels, place.channel),
                       i < mix_vectors<V>(tiling) ? place.count : 0, packed[k]);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kMixThreads;
      if (i >= mix_vectors<V>(tiling)) break;
      T values[V];
      mix_unpack(packed[k], values);
      memory.put(tile, Format::template place<V>(tiling, span, i), values);
    }
  }
}

template <int V, class Format, class S, class T>
__device__ void mix_store(const MixMemory<Format, T>& memory, int tile, const MixTiling& tiling, const TileSpan& span,
                          S* to) {
#pragma unroll 1
  for (int i = threadIdx.x; i < mix_vectors<V>(tiling); i += kMixThreads) {
    const TilePlace place = Format::template place<V>(tiling, span, i);
    T values[V];
    memory.get(tile, place, values);
    mix_write<Format>(values, place.count,
                      to + Format::offset(tiling, place, tiling.shape.channels, place.channel));
  }
}

}  // namespace hflow::cuda
