// haar on CUDA: the orthonormal Haar transform of every 2^levels block of pixels, forward and inverse. Torch-free: raw
// pointers and a stream.
//
// Bound by memory: one read and one write of x for up to three levels (one in three dimensions), in 16-byte accesses.
// A thread transforms whole blocks in registers, so no level waits for another thread: splitting all bands at every
// level makes it a Walsh–Hadamard transform of a block's n = 2^(levels·dims) pixels. It takes V neighbouring blocks, as
// many as fill 16 bytes (fewer where registers end):
//   contiguous      neighbours along the last axis: runs of V·2^levels pixels of an image row, of V elements of a band.
//   channels_last   neighbours are colours: runs of V elements of a pixel, of V (or by colour V·n) of the bands.
// Where the axis is no multiple of V, or memory not aligned, a thread takes V blocks one by one and element by element,
// kThreads apart, so that warps still read runs.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"

namespace hflow::cuda {

constexpr int kHaarValues = 64;  // that a thread holds at most: registers for two blocks on an SM, in float64 too

// Numbers of pixels and bands of a block. A slot's bits are band numbers, the first level's highest; a band number has
// a bit per axis, the last axis lowest. Bit by bit they are the coordinates of the pixel, too.
template <int Dims, int Levels>
struct HaarBlock {
  static constexpr int dims = Dims, levels = Levels, slots = 1 << (Dims * Levels), side = 1 << Levels;
  static constexpr int rows = slots / side;  // of pixels along the last axis

  // The coordinate along an axis of the pixels of a row.
  __host__ __device__ static constexpr int coordinate(int row, int axis) { return row >> (axis * Levels) & (side - 1); }
  __host__ __device__ static constexpr int slot(int row, int x) {
    int slot = 0;
    for (int axis = 0; axis < Dims; ++axis)
      for (int level = 0; level < Levels; ++level)
        slot |= ((axis + 1 < Dims ? coordinate(row, axis) : x) >> level & 1)
                << (Dims * (Levels - 1 - level) + Dims - 1 - axis);
    return slot;
  }
  __host__ __device__ static constexpr int band(int slot, int level) {
    return slot >> (Dims * (Levels - 1 - level)) & ((1 << Dims) - 1);
  }
  // The slot with the levels in the opposite order.
  __host__ __device__ static constexpr int reversed(int slot) {
    int reversed = 0;
    for (int level = 0; level < Levels; ++level) reversed |= band(slot, level) << (Dims * level);
    return reversed;
  }
  // How many levels take the average.
  __host__ __device__ static constexpr int averages(int slot) {
    int averages = 0;
    for (int level = 0; level < Levels; ++level) averages += band(slot, level) == 0;
    return averages;
  }
};

// Strides of one of the two tensors, in elements.
struct HaarSide {
  int64_t sample, colour;
  int64_t block[3];  // from block to block along each axis
  int64_t inner[3];  // image: from pixel to pixel along each axis; bands: inner[0] from slot to slot
};

template <class T>
struct HaarParameters {
  HaarSide image, bands;
  int64_t colours, blocks[3];
  int64_t units;  // of work: groups of V blocks where `wide`, else blocks
  T gains[4];     // of a slot, by its number of averages
  bool by_colour, wide, inverse;
};

// index % size; index becomes index / size. 64-bit divisions are slow, and seldom needed.
__device__ inline int64_t take(int64_t& index, int64_t size) {
  if ((index | size) >> 32 == 0) {
    const unsigned small = static_cast<unsigned>(index), quotient = small / static_cast<unsigned>(size);
    index = quotient;
    return small - quotient * static_cast<unsigned>(size);
  }
  const int64_t remainder = index % size;
  index /= size;
  return remainder;
}

// N consecutive elements, one by one or in the widest accesses that N allows, for which they must be aligned.
template <class S, int N, bool Wide>
struct HaarRun {
  static constexpr int bytes = !Wide ? 0 : N * sizeof(S) % 16 == 0 ? 16 : N * sizeof(S) % 8 == 0 ? 8 : 0;
  using Access = std::conditional_t<bytes == 16, uint4, std::conditional_t<bytes == 8, uint2, S>>;
  static constexpr int width = sizeof(Access) / sizeof(S);

  template <class T>
  __device__ static void load(const S* __restrict__ from, T (&to)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += width) {
      const Access raw = *reinterpret_cast<const Access*>(from + i);
      S elements[width];
      memcpy(elements, &raw, sizeof(raw));
#pragma unroll
      for (int j = 0; j < width; ++j) to[i + j] = to_compute<T>(elements[j]);
    }
  }

  template <class T>
  __device__ static void store(const T (&from)[N], S* __restrict__ to) {
#pragma unroll
    for (int i = 0; i < N; i += width) {
      S elements[width];
#pragma unroll
      for (int j = 0; j < width; ++j) elements[j] = to_memory<S>(from[i + j]);
      if constexpr (bytes == 0) {
        to[i] = elements[0];
      } else {
        Access raw;
        memcpy(&raw, elements, sizeof(raw));
        __stwb(reinterpret_cast<Access*>(to + i), raw);  // a plain assignment comes apart into single elements
      }
    }
  }
};

// V neighbouring blocks of a thread: values[slot][neighbour].
template <class Block, bool ChannelsLast, int V, class T>
struct HaarTile {
  T values[Block::slots][V];

  // move(run of memory, number of its first element, f): f(i) is the value at element i of the run.
  template <class Move>
  __device__ void visit_image(const HaarSide& side, const Move& move) {
#pragma unroll
    for (int row = 0; row < Block::rows; ++row) {
      int64_t offset = 0;
#pragma unroll
      for (int axis = 0; axis + 1 < Block::dims; ++axis) offset += Block::coordinate(row, axis) * side.inner[axis];
      if constexpr (ChannelsLast) {
#pragma unroll
        for (int x = 0; x < Block::side; ++x)
          move.template run<V>(offset + x * side.inner[Block::dims - 1],
                               [&](int i) -> T& { return values[Block::slot(row, x)][i]; });
      } else {
        move.template run<V * Block::side>(
            offset, [&](int i) -> T& { return values[Block::slot(row, i % Block::side)][i / Block::side]; });
      }
    }
  }

  template <class Move>
  __device__ void visit_bands(const HaarSide& side, bool by_colour, const Move& move) {
    if (ChannelsLast && by_colour) {
      move.template run<V * Block::slots>(
          0, [&](int i) -> T& { return values[i % Block::slots][i / Block::slots]; });
      return;
    }
#pragma unroll
    for (int slot = 0; slot < Block::slots; ++slot)
      move.template run<V>((by_colour ? slot : Block::reversed(slot)) * side.inner[0],
                           [&](int i) -> T& { return values[slot][i]; });
  }

  __device__ void scale(const T (&gains)[4]) {
#pragma unroll
    for (int slot = 0; slot < Block::slots; ++slot)
#pragma unroll
      for (int v = 0; v < V; ++v) values[slot][v] *= gains[Block::averages(slot)];
  }

  __device__ void transform() {
#pragma unroll
    for (int half = 1; half < Block::slots; half *= 2)
#pragma unroll
      for (int slot = 0; slot < Block::slots; ++slot) {
        if (slot & half) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const T a = values[slot][v], b = values[slot | half][v];
          values[slot][v] = a + b;
          values[slot | half][v] = a - b;
        }
      }
  }
};

template <bool Wide, class S>
struct HaarLoad {
  const S* from;

  template <int N, class F>
  __device__ void run(int64_t offset, const F& value) const {
    std::remove_reference_t<decltype(value(0))> elements[N];
    HaarRun<S, N, Wide>::load(from + offset, elements);
#pragma unroll
    for (int i = 0; i < N; ++i) value(i) = elements[i];
  }
};

template <bool Wide, class S>
struct HaarStore {
  S* to;

  template <int N, class F>
  __device__ void run(int64_t offset, const F& value) const {
    std::remove_reference_t<decltype(value(0))> elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = value(i);
    HaarRun<S, N, Wide>::store(elements, to + offset);
  }
};

template <class Block, bool ChannelsLast, int V, bool Wide, class S, class T>
__device__ void haar_unit(const S* from, S* to, const HaarParameters<T>& p, int64_t unit) {
  int64_t image = 0, bands = 0;
  const auto step = [&](int64_t position, int64_t image_stride, int64_t bands_stride) {
    image += position * image_stride;
    bands += position * bands_stride;
  };
  if (ChannelsLast) step(take(unit, p.colours / V) * V, p.image.colour, p.bands.colour);
#pragma unroll
  for (int axis = Block::dims - 1; axis >= 0; --axis) {
    const int neighbours = !ChannelsLast && axis == Block::dims - 1 ? V : 1;
    step(take(unit, p.blocks[axis] / neighbours) * neighbours, p.image.block[axis], p.bands.block[axis]);
  }
  if (!ChannelsLast) step(take(unit, p.colours), p.image.colour, p.bands.colour);
  step(unit, p.image.sample, p.bands.sample);

  HaarTile<Block, ChannelsLast, V, T> tile;
  if (p.inverse) {
    tile.visit_bands(p.bands, p.by_colour, HaarLoad<Wide, S>{from + bands});
    tile.scale(p.gains);
    tile.transform();
    tile.visit_image(p.image, HaarStore<Wide, S>{to + image});
  } else {
    tile.visit_image(p.image, HaarLoad<Wide, S>{from + image});
    tile.transform();
    tile.scale(p.gains);
    tile.visit_bands(p.bands, p.by_colour, HaarStore<Wide, S>{to + bands});
  }
}

// Blocks that a thread takes at once.
template <class Block, class S>
constexpr int kHaarNeighbours = std::max(1, std::min(kVector<S>, kHaarValues / Block::slots));

template <class Block, bool ChannelsLast, class S, class T>
__global__ void __launch_bounds__(kThreads, 1)
    haar_kernel(const S* from, S* to, const __grid_constant__ HaarParameters<T> p) {
  constexpr int V = kHaarNeighbours<Block, S>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  if (p.wide) {
    const int64_t unit = first + threadIdx.x;
    if (unit < p.units) haar_unit<Block, ChannelsLast, V, true>(from, to, p, unit);
  } else {
#pragma unroll 1
    for (int v = 0; v < V; ++v) {
      const int64_t unit = first * V + v * kThreads + threadIdx.x;
      if (unit < p.units) haar_unit<Block, ChannelsLast, 1, false>(from, to, p, unit);
    }
  }
}

// ---- Launch ----

struct HaarShape {
  int dims, levels;
  int64_t samples, colours;
  int64_t blocks[3];  // along each axis: the bands' spatial sizes
  bool channels_last;  // in two dimensions

  int64_t total() const {
    int64_t total = samples * colours;
    for (int axis = 0; axis < dims; ++axis) total *= blocks[axis];
    return total;
  }
};

// The most levels that one launch transforms.
constexpr int haar_levels(int dims) { return dims == 2 ? 3 : dims == 1 ? 2 : 1; }

template <class T>
HaarParameters<T> haar_parameters(const HaarShape& shape, bool by_colour, double gain, double average_gain,
                                  bool inverse) {
  HaarParameters<T> p{};
  const int64_t slots = int64_t{1} << (shape.dims * shape.levels), side = int64_t{1} << shape.levels;
  const int64_t channel_step = shape.channels_last ? 1 : shape.total() / (shape.samples * shape.colours);
  int64_t image_stride = shape.channels_last ? shape.colours : 1,
          bands_stride = shape.channels_last ? shape.colours * slots : 1;
  for (int axis = shape.dims - 1; axis >= 0; --axis) {
    p.blocks[axis] = shape.blocks[axis];
    p.image.inner[axis] = image_stride;
    p.image.block[axis] = image_stride * side;
    p.bands.block[axis] = bands_stride;
    image_stride *= side * shape.blocks[axis];
    bands_stride *= shape.blocks[axis];
  }
  p.colours = shape.colours;
  p.image.colour = shape.channels_last ? 1 : channel_step * slots;
  p.image.sample = p.bands.sample = shape.total() / shape.samples * slots;
  p.bands.colour = channel_step * (by_colour ? slots : 1);
  p.bands.inner[0] = channel_step * (by_colour ? 1 : shape.colours);
  for (int averages = 0; averages <= shape.levels; ++averages)
    p.gains[averages] =
        static_cast<T>(std::pow(gain, shape.levels) * std::exp2(-0.5 * shape.dims * shape.levels) *
                       std::pow(average_gain, averages));
  p.by_colour = by_colour, p.inverse = inverse;
  return p;
}

template <class Block, bool ChannelsLast, class S, class T>
cudaError_t haar_launch(const S* from, S* to, const HaarShape& shape, HaarParameters<T> p, cudaStream_t stream) {
  constexpr int V = kHaarNeighbours<Block, S>;
  p.wide = aligned(from) && aligned(to) && (ChannelsLast ? shape.colours : shape.blocks[shape.dims - 1]) % V == 0;
  p.units = shape.total() / (p.wide ? V : 1);
  const int64_t blocks = ceil_div(p.units, kThreads * (p.wide ? 1 : V));
  return launch(haar_kernel<Block, ChannelsLast, S, T>, blocks, stream, from, to, p);
}

// From image to bands, or back if `inverse`; both dense. Up to haar_levels(dims) levels.
template <class S, class T>
cudaError_t haar(const S* from, S* to, const HaarShape& shape, bool by_colour, double gain, double average_gain,
                 bool inverse, cudaStream_t stream) {
  if (shape.total() == 0) return cudaSuccess;
  const HaarParameters<T> p = haar_parameters<T>(shape, by_colour, gain, average_gain, inverse);
  switch (4 * shape.dims + shape.levels) {
    case 4 + 1: return haar_launch<HaarBlock<1, 1>, false>(from, to, shape, p, stream);
    case 4 + 2: return haar_launch<HaarBlock<1, 2>, false>(from, to, shape, p, stream);
    case 12 + 1: return haar_launch<HaarBlock<3, 1>, false>(from, to, shape, p, stream);
    case 8 + 1:
      return shape.channels_last ? haar_launch<HaarBlock<2, 1>, true>(from, to, shape, p, stream)
                                 : haar_launch<HaarBlock<2, 1>, false>(from, to, shape, p, stream);
    case 8 + 2:
      return shape.channels_last ? haar_launch<HaarBlock<2, 2>, true>(from, to, shape, p, stream)
                                 : haar_launch<HaarBlock<2, 2>, false>(from, to, shape, p, stream);
    default:
      return shape.channels_last ? haar_launch<HaarBlock<2, 3>, true>(from, to, shape, p, stream)
                                 : haar_launch<HaarBlock<2, 3>, false>(from, to, shape, p, stream);
  }
}

}  // namespace hflow::cuda
