// coupling on CUDA: an elementwise affine transform by a network's raw output, its inverse and backward. Torch-free:
// raw pointers and a stream.
//
// Bound by memory. Forward reads x and the active elements' two raw values and writes y; backward reads x, raw and
// grad_y and writes grad_x and grad_raw. Passive elements are copied: their raw values are not read.
//   A thread's vector is 16 bytes of x within a row: pixels of one channel (contiguous) or channels of one pixel
//   (channels_last), whose raw values are vectors, too. Rows that vectors do not divide go element by element, several
//   per thread, all loads issued before the first use. Options of a coupling are branches per vector, the same for a
//   whole grid; so kernels differ only in their types and in the vector.
//   Lanes of a warp share a small sample, a block works on one chunk of a large one; the log-det is summed in the same
//   pass. Where one block covers a sample that is all; else the chunks' sums go through a second small kernel, in order.
//   Chunks depend on the shape alone, so results have the same bits from run to run and from GPU to GPU.
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

// The transform of one turn's N elements. Passive ones get zeros for s, t and x, whatever lies in memory.
template <class T>
struct CouplingMath {
  ScaleMap map;
  bool shift_before;
  CouplingParameters<T> parameters;

  explicit CouplingMath(const CouplingOptions& options)
      : map(options.map),
        shift_before(shift_comes_before(options.form, options.inverse)),
        parameters(options.form, options.clamp, options.shift_clamp, options.inverse) {}

  template <int N>
  __device__ __forceinline__ void forward(const T (&x)[N], const T (&s)[N], const T (&t)[N], T (&y)[N],
                                          T (&log_scale)[N]) const {
    const CouplingParameters<T>& p = parameters;
    T scale[N];
    visit_scale_map(map, [&](auto m) {
      using Map = decltype(m);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        scale[i] = Map::scale(s[i], p.clamp, p.sign);
        log_scale[i] = p.sign * Map::log_scale(s[i], p.clamp);
      }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T shift = coupling_shift(t[i], p);
      y[i] = shift_before ? couple<true>(x[i], scale[i], shift) : couple<false>(x[i], scale[i], shift);
    }
  }

  template <int N>
  __device__ __forceinline__ void backward(const T (&x)[N], const T (&s)[N], const T (&t)[N], const T (&grad_y)[N],
                                           T grad_log_det, T (&grad_x)[N], T (&grad_s)[N], T (&grad_t)[N]) const {
    const CouplingParameters<T>& p = parameters;
    T scale[N], derivative[N];
    visit_scale_map(map, [&](auto m) {
      using Map = decltype(m);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        scale[i] = Map::scale(s[i], p.clamp, p.sign);
        derivative[i] = Map::derivative(s[i], p.clamp);
      }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (shift_before) {
        couple_gradients<true>(x[i], scale[i], derivative[i], t[i], grad_y[i], grad_log_det, p, grad_x[i], grad_s[i],
                               grad_t[i]);
      } else {
        couple_gradients<false>(x[i], scale[i], derivative[i], t[i], grad_y[i], grad_log_det, p, grad_x[i], grad_s[i],
                                grad_t[i]);
      }
    }
  }
};

// y, and the log-det; block by block into partial[sample][chunk] where that is not null.
template <class Grid>
__global__ void __launch_bounds__(kThreads, Grid::blocks_per_sm)
    coupling_forward_kernel(const typename Grid::X* x, const typename Grid::Raw* raw, typename Grid::X* y,
                            typename Grid::T* log_det, double* partial, const __grid_constant__ Grid grid,
                            CouplingMath<typename Grid::T> math) {
  using S = typename Grid::X;
  using R = typename Grid::Raw;
  using T = typename Grid::T;
  constexpr int N = Grid::elements;
  const typename Grid::Share share = grid.share();
  x += share.sample * grid.memory.sample, y += share.sample * grid.memory.sample;
  raw += share.sample * grid.memory.raw_sample;

  double sum = 0;
  for (int64_t from = share.begin; from < share.end; from += grid.turn()) {
    const CouplingTurn<Grid> turn(grid, share, from);
    S values[N];
    R scales[N], shifts[N];
    turn.load(x, values);
    turn.load_raw(raw, scales, shifts);
    T u[N] = {};
    if (turn.any_active()) {
      T s[N], t[N], log_scale[N], turn_sum = 0;
      turn.to_computed(values, u), turn.to_computed(scales, s), turn.to_computed(shifts, t);
      math.forward(u, s, t, u, log_scale);
#pragma unroll
      for (int i = 0; i < N; ++i) turn_sum += turn.active(i) ? log_scale[i] : T(0);
      sum += static_cast<double>(turn_sum);
    }
    turn.store(u, values, y);
  }

  if (grid.blocks.lanes == kThreads) {
    sum = block_sum(sum);
  } else {
    for (int offset = grid.blocks.lanes / 2; offset > 0; offset /= 2)
      sum += __shfl_down_sync(kWholeWarp, sum, offset, grid.blocks.lanes);
  }
  if (share.lane != 0) return;
  if (partial != nullptr) {
    partial[blockIdx.x] = sum;
  } else if (share.starts_sample) {
    log_det[share.sample] = static_cast<T>(sum);
  }
}

// The sums of a sample's chunks, in order; one block per sample.
template <class T>
__global__ void __launch_bounds__(kThreads) coupling_log_det_kernel(const double* partial, int64_t chunks, T* log_det) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[blockIdx.x * chunks + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) log_det[blockIdx.x] = static_cast<T>(sum);
}

// grad_x, and grad_raw with zeros where raw is ignored.
template <class Grid>
__global__ void __launch_bounds__(kThreads, Grid::blocks_per_sm)
    coupling_backward_kernel(const typename Grid::X* x, const typename Grid::Raw* raw, const typename Grid::X* grad_y,
                             const typename Grid::T* grad_log_det, typename Grid::X* grad_x,
                             typename Grid::Raw* grad_raw, const __grid_constant__ Grid grid,
                             CouplingMath<typename Grid::T> math) {
  using S = typename Grid::X;
  using R = typename Grid::Raw;
  using T = typename Grid::T;
  constexpr int N = Grid::elements;
  const typename Grid::Share share = grid.share();
  if (share.begin >= share.end) return;
  x += share.sample * grid.memory.sample, raw += share.sample * grid.memory.raw_sample;
  grad_y += share.sample * grid.memory.sample, grad_x += share.sample * grid.memory.sample;
  grad_raw += share.sample * grid.memory.raw_sample;
  const T gradient = grad_log_det[share.sample];

  for (int64_t from = share.begin; from < share.end; from += grid.turn()) {
    const CouplingTurn<Grid> turn(grid, share, from);
    S values[N], grads[N];
    R scales[N], shifts[N];
    turn.load(grad_y, grads);
    turn.load_active(x, values);
    turn.load_raw(raw, scales, shifts);
    T g[N] = {}, grad_s[N] = {}, grad_t[N] = {};
    if (turn.any_active()) {
      T u[N], s[N], t[N];
      turn.to_computed(values, u), turn.to_computed(scales, s), turn.to_computed(shifts, t);
      turn.to_computed(grads, g);
      math.backward(u, s, t, g, gradient, g, grad_s, grad_t);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      scales[i] = to_memory<R>(turn.active(i) ? grad_s[i] : T(0));
      shifts[i] = to_memory<R>(turn.active(i) ? grad_t[i] : T(0));
    }
    turn.store(g, grads, grad_x);
    turn.store_raw(scales, shifts, grad_raw);
  }
}

// ---- Launches ----

// f(grid) with the widest vectors that memory allows.
template <class S, class R, class F>
cudaError_t with_coupling_grid(const CouplingMemory& memory, bool is_aligned, const F& f) {
  constexpr int V = kVector<S>;
  return is_aligned && memory.fits(V) ? f(CouplingGrid<V, S, R>(memory)) : f(CouplingGrid<1, S, R>(memory));
}

// How many doubles coupling_forward needs in `partial`.
template <class S>
int64_t coupling_partial_size(const CouplingMemory& memory) {
  const CouplingBlocks blocks(memory.samples, memory.sample, kVector<S>);
  return memory.geometry.scales && blocks.chunks > 1 ? memory.samples * blocks.chunks : 0;
}

// S is the type of x and y, R that of raw, T (float or double) that of the log-det. x, raw and y are dense in one
// format.
template <class S, class R, class T>
cudaError_t coupling_forward(const S* x, const R* raw, S* y, T* log_det, double* partial, const CouplingMemory& memory,
                             const CouplingOptions& options, cudaStream_t stream) {
  if (memory.samples == 0) return cudaSuccess;
  const bool in_parts = coupling_partial_size<S>(memory) > 0;
  return with_coupling_grid<S, R>(memory, aligned(x) && aligned(raw) && aligned(y), [&](auto grid) {
    using Grid = decltype(grid);
    const cudaError_t error = launch(coupling_forward_kernel<Grid>, grid.blocks.blocks(memory.samples), stream, x, raw,
                                     y, log_det, in_parts ? partial : nullptr, grid, CouplingMath<T>(options));
    if (error != cudaSuccess || !in_parts) return error;
    return launch(coupling_log_det_kernel<T>, memory.samples, stream, partial, grid.blocks.chunks, log_det);
  });
}

template <class S, class R, class T>
cudaError_t coupling_backward(const S* x, const R* raw, const S* grad_y, const T* grad_log_det, S* grad_x, R* grad_raw,
                              const CouplingMemory& memory, const CouplingOptions& options, cudaStream_t stream) {
  if (memory.samples == 0 || memory.sample == 0) return cudaSuccess;
  const bool is_aligned = aligned(x) && aligned(raw) && aligned(grad_y) && aligned(grad_x) && aligned(grad_raw);
  return with_coupling_grid<S, R>(memory, is_aligned, [&](auto grid) {
    return launch(coupling_backward_kernel<decltype(grid)>, grid.blocks.blocks(memory.samples), stream, x, raw, grad_y,
                  grad_log_det, grad_x, grad_raw, grid, CouplingMath<T>(options));
  });
}

}  // namespace hflow::cuda
