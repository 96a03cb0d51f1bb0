// How coupling's kernels walk x and raw: the blocks' shares of the samples, and a thread's elements of one turn. Free of
// torch.
//
// A thread's vector is 16 bytes of x within a row: pixels of one channel (contiguous) or channels of one pixel
// (channels_last), whose raw values are vectors, too. Rows that vectors do not divide go element by element, several per
// thread. All loads of a turn are issued before the first use; passive elements' raw values are not read.
#pragma once

#include <algorithm>

#include "common/coupling_geometry.h"
#include "common/divisor.h"
#include "cuda/device.cuh"

namespace hflow::cuda {

// What belongs to some neighbouring elements of x.
struct RawPlace {
  int64_t offset;   // of their values in a sample of raw, from CouplingMemory::scale_at and shift_at
  unsigned active;  // bit i: element i is transformed
  bool stored;      // raw has values for them, if only to be ignored
};

// x and raw in memory. A sample is rows of elements: the pixels of a channel, or the channels of a pixel.
struct CouplingMemory {
  CouplingGeometry geometry;
  int64_t samples;
  bool rows_are_channels;
  Divisor row, width;  // elements of a row; pixels of an image row
  int64_t sample, raw_sample;
  int64_t per_channel, per_pixel, scale_at, shift_at;  // in raw; *_at belongs to channel 0, so may lie before raw

  CouplingMemory(const CouplingGeometry& of, int64_t samples, bool channels_last)
      : geometry(seen_as(of, channels_last)),
        samples(samples),
        rows_are_channels(!channels_last && geometry.pixels() > 1),
        row(rows_are_channels ? geometry.pixels() : geometry.channels),
        width(geometry.width),
        sample(geometry.channels * geometry.pixels()),
        raw_sample(geometry.raw_channels * geometry.pixels()) {
    const int64_t of_channel = rows_are_channels ? geometry.pixels() : 1;
    per_channel = geometry.raw_step * of_channel, per_pixel = rows_are_channels ? 1 : geometry.raw_channels;
    scale_at = geometry.scale_channel(0) * of_channel, shift_at = geometry.shift_channel(0) * of_channel;
  }

  // In contiguous memory with all scales on one side and no spatial set, pixels are like channels: one long row.
  static CouplingGeometry seen_as(CouplingGeometry g, bool channels_last) {
    if (channels_last || g.spatial || g.raw_step != 1) return g;
    for (int64_t* channels : {&g.channels, &g.passive, &g.raw_channels, &g.without_raw, &g.first_scale, &g.first_shift})
      *channels *= g.pixels();
    g.height = g.width = 1;
    return g;
  }

  // Scales and shifts alternate element by element.
  __host__ __device__ bool alternating() const { return geometry.raw_step == 2 && !rows_are_channels; }

  // Whether vectors of v elements divide rows, passive channels and raw's runs.
  bool fits(int v) const {
    const int64_t first = std::min(scale_at, shift_at), second = std::max(scale_at, shift_at);
    return row.value() % v == 0 && (rows_are_channels ? per_channel : per_pixel) % v == 0 && first % v == 0 &&
           (alternating() || second % v == 0) && (rows_are_channels || geometry.passive % v == 0);
  }

  // V elements of a row, from element e of a sample on.
  template <int V>
  __device__ __forceinline__ RawPlace place(int64_t e) const {
    const int64_t r = row.divide(e), k = e - r * row.value();
    const int64_t channel = rows_are_channels ? r : k, pixel = rows_are_channels ? k : r;
    unsigned active = geometry.active_channel(channel) ? (1u << V) - 1 : 0;
    if (geometry.spatial) active = active_pixels<V>(pixel);
    return {channel * per_channel + pixel * per_pixel, active, geometry.has_raw(channel)};
  }

 private:
  template <int V>
  __device__ __forceinline__ unsigned active_pixels(int64_t pixel) const {
    int64_t i = width.divide(pixel), j = pixel - i * width.value();
    unsigned active = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      active |= static_cast<unsigned>(geometry.active_pixel(i, j)) << v;
      if (rows_are_channels && ++j == width.value()) j = 0, ++i;
    }
    return active;
  }
};

// How a grid covers the samples: a block works on a chunk of one sample, or on kThreads / lanes whole ones.
struct CouplingBlocks {
  static constexpr int64_t kIterations = 4;     // of a block over its chunk; pays for the block's sum
  static constexpr int64_t kEnough = 1024;      // blocks that fill the largest target: below, chunks are shorter
  static constexpr int64_t kMostChunks = 4096;  // per sample; above, chunks grow

  int lanes;  // threads on one sample: a power of two up to 32, or all
  int64_t chunk, chunks;

  // `vector`: elements of x in 16 bytes.
  CouplingBlocks(int64_t samples, int64_t sample, int vector) : lanes(1), chunk(sample), chunks(1) {
    if (sample <= 32 * vector * kIterations) {
      while (lanes < 32 && lanes * vector < sample) lanes *= 2;
      return;
    }
    lanes = kThreads;
    const int64_t tile = kThreads * vector, tiles = ceil_div(sample, tile);
    if (tiles <= kIterations) return;
    const int64_t share = std::clamp<int64_t>(samples * tiles / kEnough, 1, kIterations);
    chunk = std::max(share, ceil_div(tiles, kMostChunks)) * tile;
    chunks = ceil_div(sample, chunk);
  }

  __host__ __device__ int groups() const { return kThreads / lanes; }
  int64_t blocks(int64_t samples) const { return chunks > 1 ? samples * chunks : ceil_div(samples, groups()); }
};

// V: elements of a vector; 16 bytes of x, or 1. S: type of x, y and their gradients, R: of raw and its gradient.
template <int V, class S, class R>
struct CouplingGrid {
  static constexpr int vector = V;
  static constexpr int pieces = V > 1 || sizeof(S) == 8 ? 1 : 4;  // vectors in flight per thread
  static constexpr int elements = V * pieces;
  // What registers are shared out for: 64 per thread where that suffices, else 128. Forward then has 24 KB of loads in
  // flight on an SM, more than memory's latency needs; 12 to 16 KB where half types or float64 go element by element.
  static constexpr int blocks_per_sm = V == 4 ? 4 : 2;
  using X = S;
  using Raw = R;
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;

  CouplingMemory memory;
  CouplingBlocks blocks;
  Divisor chunks;

  CouplingGrid(const CouplingMemory& memory)
      : memory(memory), blocks(memory.samples, memory.sample, kVector<S>), chunks(blocks.chunks) {}

  // What a thread works on, together with the other lanes on its sample.
  struct Share {
    int64_t sample, begin, end;
    int lane;
    bool starts_sample;
  };
  __device__ __forceinline__ Share share() const {
    const int64_t whole = chunks.divide(blockIdx.x), begin = (blockIdx.x - whole * blocks.chunks) * blocks.chunk;
    const int64_t sample = whole * blocks.groups() + threadIdx.x / blocks.lanes;
    const bool exists = sample < memory.samples;
    return {sample, begin, exists ? min(begin + blocks.chunk, memory.sample) : begin,
            static_cast<int>(threadIdx.x) % blocks.lanes, exists && begin == 0};
  }

  // The lanes take turns of `elements` each, from element `begin` of the sample on.
  __device__ __forceinline__ int64_t turn() const { return static_cast<int64_t>(blocks.lanes) * elements; }
  __device__ __forceinline__ int64_t piece(int64_t begin, int lane, int i) const {
    return begin + static_cast<int64_t>(i * blocks.lanes + lane) * V;
  }
};

// A thread's elements in one turn: their places, and accesses of them. Pointers are to the start of the sample; values
// stay in memory's type until they are computed with, so that all loads of a turn are issued before the first use.
template <class Grid>
class CouplingTurn {
 public:
  static constexpr int V = Grid::vector, elements = Grid::elements;
  using S = typename Grid::X;
  using R = typename Grid::Raw;

  __device__ __forceinline__ CouplingTurn(const Grid& grid, const typename Grid::Share& share, int64_t from)
      : memory_(grid.memory), end_(share.end) {
#pragma unroll
    for (int i = 0; i < Grid::pieces; ++i) {
      begin_[i] = grid.piece(from, share.lane, i);
      places_[i] = begin_[i] < end_ ? memory_.template place<V>(begin_[i]) : RawPlace{0, 0, false};
      active_ |= places_[i].active << i * V;
    }
  }

  __device__ __forceinline__ bool any_active() const { return active_ != 0; }
  __device__ __forceinline__ bool active(int i) const { return active_ >> i & 1; }

  // Compute types of the active elements, zeros for the others.
  template <class M, class T>
  __device__ __forceinline__ void to_computed(const M (&values)[elements], T (&computed)[elements]) const {
#pragma unroll
    for (int i = 0; i < elements; ++i) computed[i] = active(i) ? to_compute<T>(values[i]) : T(0);
  }

  __device__ __forceinline__ void load(const S* from, S (&values)[elements]) const {
#pragma unroll
    for (int i = 0; i < Grid::pieces; ++i)
      if (begin_[i] < end_) load_packed<V>(from + begin_[i], values + i * V);
  }
  // Only pieces with active elements.
  __device__ __forceinline__ void load_active(const S* from, S (&values)[elements]) const {
#pragma unroll
    for (int i = 0; i < Grid::pieces; ++i)
      if (places_[i].active) load_packed<V>(from + begin_[i], values + i * V);
  }
  // The computed value of active elements, what was loaded of passive ones.
  template <class T>
  __device__ __forceinline__ void store(const T (&computed)[elements], const S (&loaded)[elements], S* to) const {
    S values[elements];
#pragma unroll
    for (int i = 0; i < elements; ++i) values[i] = active(i) ? to_memory<S>(computed[i]) : loaded[i];
#pragma unroll
    for (int i = 0; i < Grid::pieces; ++i)
      if (begin_[i] < end_) store_packed<V>(values + i * V, to + begin_[i]);
  }

  // Scales and shifts of pieces with active elements. Additive couplings ignore the scale.
  __device__ __forceinline__ void load_raw(const R* raw, R (&scales)[elements], R (&shifts)[elements]) const {
    if (V > 1 && memory_.alternating()) {
      if (!places_[0].active) return;
      R run[2 * V];
      load_packed<V>(raw + run_at(), run);
      load_packed<V>(raw + run_at() + V, run + V);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        scales[i] = scale_first() ? run[2 * i] : run[2 * i + 1];
        shifts[i] = scale_first() ? run[2 * i + 1] : run[2 * i];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < Grid::pieces; ++i) {
      if (!places_[i].active) continue;
      load_packed<V>(raw + memory_.shift_at + places_[i].offset, shifts + i * V);
      if (memory_.geometry.scales) {
        load_packed<V>(raw + memory_.scale_at + places_[i].offset, scales + i * V);
      } else {
#pragma unroll
        for (int v = i * V; v < (i + 1) * V; ++v) scales[v] = shifts[v];
      }
    }
  }
  // To all places that raw has.
  __device__ __forceinline__ void store_raw(const R (&scales)[elements], const R (&shifts)[elements], R* raw) const {
    if (V > 1 && memory_.alternating()) {
      if (!places_[0].stored) return;
      R run[2 * V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        run[2 * i] = scale_first() ? scales[i] : shifts[i];
        run[2 * i + 1] = scale_first() ? shifts[i] : scales[i];
      }
      store_packed<V>(run, raw + run_at());
      store_packed<V>(run + V, raw + run_at() + V);
      return;
    }
#pragma unroll
    for (int i = 0; i < Grid::pieces; ++i) {
      if (!places_[i].stored) continue;
      if (memory_.geometry.scales) store_packed<V>(scales + i * V, raw + memory_.scale_at + places_[i].offset);
      store_packed<V>(shifts + i * V, raw + memory_.shift_at + places_[i].offset);
    }
  }

 private:
  // Of a vector whose scales and shifts alternate: 2V consecutive values of raw.
  __device__ __forceinline__ bool scale_first() const { return memory_.scale_at < memory_.shift_at; }
  __device__ __forceinline__ int64_t run_at() const {
    return min(memory_.scale_at, memory_.shift_at) + places_[0].offset;
  }

  const CouplingMemory& memory_;
  int64_t end_;
  int64_t begin_[Grid::pieces];
  RawPlace places_[Grid::pieces];
  unsigned active_ = 0;  // bit i: element i is transformed
};

}  // namespace hflow::cuda
