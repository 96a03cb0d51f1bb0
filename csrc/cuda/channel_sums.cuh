// The gradients of W and b of the channel affine y = W u + b: Σ over pixels of g[o]·u[c] and of g[o]. Free of torch.
//
// 8 × 4 pairs (o, c) per thread, a tile's pixels dealt out among threads. The sums stay in registers from tile to tile;
// then one partial sum per block, of C² + C values, and a second small kernel adds those in order. Grids depend on the
// shape alone and there are no atomics: the same bits from run to run and GPU to GPU.
#pragma once

#include <algorithm>

#include "cuda/channel_tile.cuh"

namespace hflow::cuda {

// A thread's share of the gradients of W and b: Σ g[o]·u[c] and Σ g[o] over every `lanes`-th pixel.
template <class Format, class T>
class MixSums {
  static constexpr int kRows = 8, kColumns = 4;  // pairs (o, c) of a thread

 public:
  __device__ explicit MixSums(const MixTiling& tiling)
      : products_{}, sums_{}, row_groups_(tiling.size / kRows), column_groups_(tiling.size / kColumns) {
    lanes_ = kMixThreads / (row_groups_ * column_groups_);
    group_ = static_cast<int>(threadIdx.x) / lanes_;
    lane_ = static_cast<int>(threadIdx.x) - group_ * lanes_;
  }

  // Tile 0 holds g, tile 1 holds u. Channels that do not exist read the last one's values: their sums go nowhere.
  __device__ void add(const MixTiling& tiling, const TileSpan& span, const MixMemory<Format, T>& memory) {
    const int last = tiling.shape.channels - 1;
    int g_rows[kRows], u_rows[kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) g_rows[i] = memory.row(0, min(row(i), last));
#pragma unroll
    for (int i = 0; i < kColumns; ++i) u_rows[i] = memory.row(1, min(column(i), last));
    for (int pixel = lane_; pixel < span.pixels; pixel += lanes_) {
      T u[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) u[i] = (*memory)[u_rows[i] + pixel];
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const T g = (*memory)[g_rows[o] + pixel];
        sums_[o] += g;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) products_[o][c] += g * u[c];
      }
    }
  }

  // The block's sums: W's by rows, then b's. Overwrites shared memory.
  __device__ void finish(const MixTiling& tiling, const MixMemory<Format, T>& memory, T* partial) {
    const int channels = tiling.shape.channels, pitch = tiling.size + 1;  // a row of sums, that of b at its end
    const int width = min(lanes_, 32), parts = lanes_ / width, part = lane_ / 32 * tiling.size * pitch;
    const bool leads = lane_ % width == 0;
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
      const T sum = sum_lanes(sums_[o], width);
      if (leads && group_ % column_groups_ == 0) (*memory)[part + row(o) * pitch + tiling.size] = sum;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const T product = sum_lanes(products_[o][c], width);
        if (leads) (*memory)[part + row(o) * pitch + column(c)] = product;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < channels * channels + channels; i += kMixThreads) {
      const bool of_bias = i >= channels * channels;
      const int o = of_bias ? i - channels * channels : i / channels;
      const int at = o * pitch + (of_bias ? tiling.size : i - o * channels);
      T sum = (*memory)[at];
      for (int k = 1; k < parts; ++k) sum += (*memory)[at + k * tiling.size * pitch];
      partial[i] = sum;
    }
  }

 private:
  __device__ int row(int i) const {
    return Format::template summand<kRows>(group_ / column_groups_, row_groups_, i);
  }
  __device__ int column(int i) const {
    return Format::template summand<kColumns>(group_ % column_groups_, column_groups_, i);
  }
  __device__ static T sum_lanes(T value, int width) {
    for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_down_sync(kWholeWarp, value, offset, width);
    return value;
  }

  T products_[kRows][kColumns], sums_[kRows];
  int row_groups_, column_groups_, lanes_, group_, lane_;
};

// ---- The blocks' sums, in order ----

constexpr int kSumThreads = 1024;  // 32 sums, 32 threads each

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    mix_gradients_kernel(const T* partial, int64_t parts, int channels, T* grad_weight, T* grad_bias) {
  __shared__ SharedArray<T, 32 * 33> sums;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32, weights = channels * channels, count = weights + channels;
  const int i = static_cast<int>(blockIdx.x) * 32 + lane;
  T sum = 0;
  if (i < count) {
#pragma unroll 8
    for (int64_t part = row; part < parts; part += 32) sum += partial[part * count + i];
  }
  sums[row * 33 + lane] = sum;
  __syncthreads();
  if (row != 0 || i >= count) return;
  double total = 0;
  for (int k = 0; k < 32; ++k) total += static_cast<double>(static_cast<T>(sums[k * 33 + lane]));
  (i < weights ? grad_weight + i : grad_bias + (i - weights))[0] = static_cast<T>(total);
}

// Blocks of a backward pass, each with a row of partial sums: enough for even shares of work, few enough that adding
// them up takes little of the time.
inline int64_t mix_backward_blocks(const MixTiling& tiling) {
  return std::min<int64_t>(tiling.tiles(), tiling.size <= 16 ? 1056 : 528);
}

// How many T a backward pass needs in `partial`.
inline int64_t mix_partial_size(const MixTiling& tiling) {
  const int64_t channels = tiling.shape.channels;
  return mix_backward_blocks(tiling) * (channels * channels + channels);
}

template <class T>
cudaError_t mix_gradients(const T* partial, int64_t parts, int channels, T* grad_weight, T* grad_bias,
                          cudaStream_t stream) {
  return launch(mix_gradients_kernel<T>, LaunchShape(ceil_div(channels * channels + channels, 32), kSumThreads), stream,
                partial, parts, channels, grad_weight, grad_bias);
}

}  // namespace hflow::cuda
