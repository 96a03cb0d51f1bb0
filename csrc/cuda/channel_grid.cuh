// How elementwise ops with parameters per channel cover a tensor in 16-byte accesses, and sum over its channels.
//
//   contiguous      A block works on one channel of all samples, so its parameter is one register. A thread's vector is
//                   a 16-byte window of memory; where a row of pixels starts or ends inside it, its elements are
//                   accessed singly.
//   channels_last   The grid walks all elements; its stride is a multiple of C, so the channels of a thread's elements
//                   never change, and their parameters and sums stay in registers, too.
// Grids depend on the shape alone, so results have the same bits from run to run and from GPU to GPU.
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda/device.cuh"

namespace hflow::cuda {

constexpr int64_t kVectorsPerThread = 4;  // enough to pay for a thread's scales
constexpr int64_t kMaxBlocks = 2048;      // fill the largest target twice over; more would only add partial sums

struct ChannelShape {
  int64_t samples, channels, pixels;
  bool by_rows;  // contiguous, and more than one pixel

  __host__ __device__ int64_t total() const { return samples * channels * pixels; }
};

// How a grid covers the elements in vectors of V.
template <int V, bool ByRows>
struct ChannelGrid {
  static constexpr int vector = V;
  static constexpr bool by_rows = ByRows;
  static constexpr int kinds = ByRows ? 1 : V;  // different channels among the elements of a thread's vectors
  ChannelShape shape;

  // Windows of V elements that a row touches. Every row starts at a multiple of `pixels`, not always at one of V.
  __host__ __device__ int64_t windows() const { return shape.pixels / V + (shape.pixels % V == 0 ? 0 : 2); }

  int64_t blocks() const {
    constexpr int64_t share = kThreads * kVectorsPerThread;
    if (shape.total() == 0) return 1;
    if (ByRows) {
      const int64_t most = std::max<int64_t>(1, kMaxBlocks / shape.channels);
      return shape.channels * std::min(most, ceil_div(shape.samples * windows(), share));
    }
    // Blocks in multiples of this keep the stride a multiple of C.
    const int64_t step = shape.channels / std::gcd(shape.channels, int64_t{kThreads} * V);
    return ceil_div(std::min(kMaxBlocks, ceil_div(shape.total(), share * V)), step) * step;
  }

  // Partial sums per channel: the blocks that work on it, or (channels_last) may do so.
  __host__ __device__ static int64_t parts(int64_t blocks, int64_t channels) {
    return ByRows ? blocks / channels : blocks;
  }

  // The channel of element i of this thread's vectors.
  __device__ int64_t channel(int i) const {
    return (ByRows ? blockIdx.x : (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V + i) % shape.channels;
  }

  // f(offset, low, high) for this thread's vectors: elements [offset + low, offset + high) are its own.
  template <class F>
  __device__ void walk(const F& f) const {
    if constexpr (ByRows) {
      const int64_t channel = blockIdx.x % shape.channels;
      const int64_t part = blockIdx.x / shape.channels, parts = gridDim.x / shape.channels;
      for (int64_t i = part * kThreads + threadIdx.x; i < shape.samples * windows(); i += parts * kThreads) {
        const int64_t begin = (i / windows() * shape.channels + channel) * shape.pixels, end = begin + shape.pixels;
        const int64_t offset = (begin / V + i % windows()) * V;
        if (offset < end)
          f(offset, static_cast<int>(max(begin - offset, int64_t{0})), static_cast<int>(min(end - offset, int64_t{V})));
      }
    } else {
      const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
      for (int64_t offset = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; offset < shape.total();
           offset += stride)
        f(offset, 0, static_cast<int>(min(shape.total() - offset, int64_t{V})));
    }
  }
};

// A thread's sums per kind of channel → the block's sums per channel: partial[Q][parts][channels].
template <class Grid, class T, int Q>
__device__ void store_channel_sums(const Grid& grid, const T (&sums)[Q][Grid::kinds], T* partial) {
  const int64_t channels = grid.shape.channels, parts = Grid::parts(gridDim.x, channels);
  if constexpr (Grid::by_rows) {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const T sum = block_sum(sums[q][0]);
      if (threadIdx.x == 0) partial[q * parts * channels + blockIdx.x] = sum;
    }
  } else {
    // Element e of the block belongs to channel (first + e) % channels; each channel's elements are added in order.
    constexpr int count = kThreads * Grid::vector;
    __shared__ SharedArray<T, count> elements;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * count % channels;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Grid::vector; ++i) elements[threadIdx.x * Grid::vector + i] = sums[q][i];
      __syncthreads();
      for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
        T sum = 0;
        for (int64_t e = (c - first + channels) % channels; e < count; e += channels) sum += elements[e];
        partial[(q * parts + blockIdx.x) * channels + c] = sum;
      }
    }
  }
}

// f(grid) with the widest vectors that the pointers allow.
template <class S, class F>
auto with_channel_grid(const ChannelShape& shape, bool is_aligned, const F& f) {
  constexpr int V = kVector<S>;
  if (shape.by_rows) return is_aligned ? f(ChannelGrid<V, true>{shape}) : f(ChannelGrid<1, true>{shape});
  return is_aligned ? f(ChannelGrid<V, false>{shape}) : f(ChannelGrid<1, false>{shape});
}

// How many partial sums of one kind a grid makes.
template <class S>
int64_t channel_sums_size(const ChannelShape& shape, bool is_aligned) {
  if (shape.total() == 0) return 0;
  return with_channel_grid<S>(
      shape, is_aligned, [&](auto grid) { return shape.channels * grid.parts(grid.blocks(), shape.channels); });
}

}  // namespace hflow::cuda
