// instance_norm on CUDA: (x − mean)/√(var + ε) per channel of a sample, and backward. Torch-free.
//
// Bound by memory: forward reads x and writes y, backward reads x and grad_y and writes grad_x, in 16-byte accesses. The
// mean, the moments and the result take one walk each; what is normalised together belongs to one block, so the second
// and third find it in the caches, and no sum crosses blocks: no atomics, the same bits in every run.
//   planes          (contiguous; the channels of a single pixel count as one) A block has a plane: a warp where it is
//                   small, else 256 threads. A thread's vector is a 16-byte window of memory; where the plane starts or
//                   ends inside it, its elements are accessed singly.
//   pixels          (channels_last) A block has the channels of one 32-byte sector, the least that memory moves, in all
//                   pixels of a sample; threads take pixels in turn, and their sums meet in shared memory.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "network_formulas.h"

namespace hflow::cuda {

// count × n values that are normalised over n (planes); samples × n pixels × channels (pixels).
struct InstanceNormShape {
  int64_t count, n, channels;
  bool interleaved;

  __host__ __device__ int64_t total() const { return count * n * channels; }
};

template <int V, int Threads>
struct PlaneGrid {
  static constexpr int vector = V, threads = Threads, kinds = 1;  // channels per thread
  // Blocks per SM that registers must allow: 32 warps, or the 16 blocks that sm_86 takes at most.
  static constexpr int resident = std::min(1024 / Threads, 16);
  InstanceNormShape shape;

  // f(offset, low, high) for this thread's vectors: elements [offset + low, offset + high) are its own.
  template <class F>
  __device__ void walk(const F& f) const {
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * shape.n, end = begin + shape.n;
    for (int64_t offset = begin / V * V + threadIdx.x * V; offset < end; offset += Threads * V)
      f(offset, static_cast<int>(max(begin - offset, int64_t{0})), static_cast<int>(min(end - offset, int64_t{V})));
  }

  // Every thread's sums become those of its channel.
  template <class S, class T, int Count>
  __device__ void total(T (&sums)[Count][kinds]) const {
#pragma unroll
    for (int q = 0; q < Count; ++q) sums[q][0] = block_sum<Threads>(sums[q][0]);
  }
};

template <int V>
struct PixelGrid {
  static constexpr int vector = V, threads = kThreads, kinds = V;
  static constexpr int resident = 3;  // blocks per SM: leaves the registers that all channels of a thread need
  static constexpr int kSector = 32;
  InstanceNormShape shape;

  // Threads side by side in one pixel of a block, and pixels at a time.
  template <class S>
  static constexpr int across = kSector / (V * static_cast<int>(sizeof(S)));

  template <class S>
  __host__ __device__ unsigned groups() const {
    return static_cast<unsigned>(ceil_div(shape.channels, across<S> * V));
  }

  // Offsets are multiples of V in the sight of the compiler, too, which else splits the vectors.
  template <class S, class F>
  __device__ void walk(const F& f) const {
    const int64_t vectors = shape.channels / V, sample = blockIdx.x / groups<S>();
    const int64_t vector = blockIdx.x % groups<S>() * across<S> + threadIdx.x % across<S>;
    if (vector >= vectors) return;
#pragma unroll 2  // more would spill
    for (int64_t pixel = threadIdx.x / across<S>; pixel < shape.n; pixel += threads / across<S>)
      f(((sample * shape.n + pixel) * vectors + vector) * V, 0, V);
  }

  template <class S, class T, int Count>
  __device__ void total(T (&sums)[Count][kinds]) const {
    constexpr int width = across<S> * V;  // channels of the block
    __shared__ SharedArray<T, threads * V> partial;
#pragma unroll
    for (int q = 0; q < Count; ++q) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < V; ++i) partial[threadIdx.x * V + i] = sums[q][i];
      // Rows of `width` sums are folded by halves, always in the same order.
      for (int rows = threads / across<S> / 2; rows > 0; rows /= 2) {
        __syncthreads();
        for (int e = threadIdx.x; e < rows * width; e += threads) {
          const T other = partial[e + rows * width];
          partial[e] += other;
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < V; ++i) sums[q][i] = partial[threadIdx.x % across<S> * V + i];
    }
  }
};

// The two grids walk alike; only pixels need to know the type.
template <class S, int V, int Threads, class F>
__device__ void walk(const PlaneGrid<V, Threads>& grid, const F& f) {
  grid.walk(f);
}
template <class S, int V, class F>
__device__ void walk(const PixelGrid<V>& grid, const F& f) {
  grid.template walk<S>(f);
}

// The means of a thread's channels, as far as T holds them.
template <class Grid, class S, class T>
__device__ void find_centers(const Grid& grid, const S* x, T (&center)[Grid::kinds]) {
  T sums[1][Grid::kinds] = {};
  walk<S>(grid, [&](int64_t offset, int low, int high) {
    T values[Grid::vector];
    load(x + offset, low, high, values);  // zeros outside
#pragma unroll
    for (int i = 0; i < Grid::vector; ++i) sums[0][i % Grid::kinds] += values[i];
  });
  grid.template total<S>(sums);
#pragma unroll
  for (int k = 0; k < Grid::kinds; ++k) center[k] = sums[0][k] / static_cast<T>(grid.shape.n);
}

template <class Grid, class S, class T>
__global__ void __launch_bounds__(Grid::threads, Grid::resident)
    instance_norm_forward_kernel(const S* x, S* y, T epsilon, Grid grid) {
  constexpr int V = Grid::vector, K = Grid::kinds;
  T center[K], sums[2][K] = {};
  find_centers(grid, x, center);
  walk<S>(grid, [&](int64_t offset, int low, int high) {
    T values[V];
    load(x + offset, low, high, values);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const T d = i >= low && i < high ? values[i] - center[i % K] : T(0);
      sums[0][i % K] += d;
      sums[1][i % K] += d * d;
    }
  });
  grid.template total<S>(sums);
  T scale[K], shift[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const InstanceNorm<T> norm(static_cast<T>(grid.shape.n), sums[0][k], sums[1][k], epsilon);
    scale[k] = norm.scale(), shift[k] = norm.shift();
  }
  walk<S>(grid, [&](int64_t offset, int low, int high) {
    T values[V];
    load(x + offset, low, high, values);
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = (values[i] - center[i % K]) * scale[i % K] + shift[i % K];
    store(values, low, high, y + offset);
  });
}

template <class Grid, class S, class T>
__global__ void __launch_bounds__(Grid::threads, Grid::resident)
    instance_norm_backward_kernel(const S* x, const S* grad_y, S* grad_x, T epsilon, Grid grid) {
  constexpr int V = Grid::vector, K = Grid::kinds;
  T center[K], sums[4][K] = {};
  find_centers(grid, x, center);
  walk<S>(grid, [&](int64_t offset, int low, int high) {
    T values[V], grads[V];
    load(x + offset, low, high, values);
    load(grad_y + offset, low, high, grads);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const T d = i >= low && i < high ? values[i] - center[i % K] : T(0);
      sums[0][i % K] += d;
      sums[1][i % K] += d * d;
      sums[2][i % K] += grads[i];
      sums[3][i % K] += grads[i] * d;
    }
  });
  grid.template total<S>(sums);
  T of_grad[K], of_d[K], constant[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const InstanceNorm<T> norm(static_cast<T>(grid.shape.n), sums[0][k], sums[1][k], epsilon);
    const InstanceNormGradient<T> gradient(norm, sums[2][k], sums[3][k]);
    of_grad[k] = gradient.of_grad, of_d[k] = gradient.of_d, constant[k] = gradient.constant;
  }
  walk<S>(grid, [&](int64_t offset, int low, int high) {
    T values[V], grads[V];
    load(x + offset, low, high, values);
    load(grad_y + offset, low, high, grads);
#pragma unroll
    for (int i = 0; i < V; ++i)
      grads[i] = of_grad[i % K] * grads[i] + (of_d[i % K] * (values[i] - center[i % K]) + constant[i % K]);
    store(grads, low, high, grad_x + offset);
  });
}

// ---- Launches ----

// f(grid, blocks) with the widest vectors that the pointers allow.
template <class S, class F>
cudaError_t with_norm_grid(const InstanceNormShape& shape, bool is_aligned, const F& f) {
  constexpr int V = kVector<S>;
  const auto by_pixels = [&](auto grid) { return f(grid, shape.count * grid.template groups<S>()); };
  if (shape.total() == 0) return cudaSuccess;
  if (shape.interleaved) {
    return is_aligned && shape.channels % V == 0 ? by_pixels(PixelGrid<V>{shape}) : by_pixels(PixelGrid<1>{shape});
  }
  constexpr int64_t kSmall = 32 * 4 * V;  // up to four vectors per lane of a warp
  if (!is_aligned) return f(PlaneGrid<1, kThreads>{shape}, shape.count);
  return shape.n <= kSmall ? f(PlaneGrid<V, 32>{shape}, shape.count) : f(PlaneGrid<V, kThreads>{shape}, shape.count);
}

// S is the type of x, y and their gradients, all dense in one format; T, float or double, that of the statistics.
template <class S, class T>
cudaError_t instance_norm_forward(const S* x, S* y, T epsilon, const InstanceNormShape& shape, cudaStream_t stream) {
  return with_norm_grid<S>(shape, aligned(x) && aligned(y), [&](auto grid, int64_t blocks) {
    using Grid = decltype(grid);
    return launch(instance_norm_forward_kernel<Grid, S, T>, LaunchShape(blocks, Grid::threads), stream, x, y, epsilon,
                  grid);
  });
}

template <class S, class T>
cudaError_t instance_norm_backward(const S* x, const S* grad_y, S* grad_x, T epsilon, const InstanceNormShape& shape,
                                   cudaStream_t stream) {
  const bool is_aligned = aligned(x) && aligned(grad_y) && aligned(grad_x);
  return with_norm_grid<S>(shape, is_aligned, [&](auto grid, int64_t blocks) {
    using Grid = decltype(grid);
    return launch(instance_norm_backward_kernel<Grid, S, T>, LaunchShape(blocks, Grid::threads), stream, x, grad_y,
                  grad_x, epsilon, grid);
  });
}

}  // namespace hflow::cuda
