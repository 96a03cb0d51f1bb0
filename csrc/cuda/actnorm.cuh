// actnorm on CUDA: y = x·e^s + b per channel, its inverse and backward. Torch-free: raw pointers and a stream.
//
// Bound by memory: forward reads x and writes y, backward reads x and grad_y and writes grad_x, in 16-byte accesses of
// channel_grid.cuh. Backward's channel sums go through one partial sum per block and a second small kernel: no atomics.
#pragma once

#include "common/vector_math.h"
#include "cuda/channel_grid.cuh"

namespace hflow::cuda {

// y = (x − center)·scale + shift, with center = 0 forward and shift = 0 in the inverse.
template <class T>
struct ChannelAffine {
  T scale, center, shift;

  __device__ static ChannelAffine of(T log_scale, T bias, bool inverse) {
    return {math::exp(inverse ? -log_scale : log_scale), inverse ? bias : T(0), inverse ? T(0) : bias};
  }
};

// log_det = ±pixels·Σ log_scale, the same for every sample; work for one block.
template <class T>
__device__ void write_log_det(const T* log_scale, T* log_det, const ChannelShape& shape, bool inverse) {
  double sum = 0;
  for (int64_t c = threadIdx.x; c < shape.channels; c += kThreads) sum += static_cast<double>(log_scale[c]);
  const double total = (inverse ? -1.0 : 1.0) * static_cast<double>(shape.pixels) * block_sum(sum);
  for (int64_t b = threadIdx.x; b < shape.samples; b += kThreads) log_det[b] = static_cast<T>(total);
}

template <class Grid, class T>
struct ThreadAffines {
  ChannelAffine<T> of_kind[Grid::kinds];

  __device__ ThreadAffines(const Grid& grid, const T* log_scale, const T* bias, bool inverse) {
#pragma unroll
    for (int i = 0; i < Grid::kinds; ++i) {
      const int64_t c = grid.channel(i);
      of_kind[i] = ChannelAffine<T>::of(log_scale[c], bias[c], inverse);
    }
  }
  __device__ const ChannelAffine<T>& operator[](int i) const { return of_kind[i % Grid::kinds]; }
};

template <class Grid, class S, class T>
__global__ void __launch_bounds__(kThreads)
    actnorm_forward_kernel(const S* x, const T* log_scale, const T* bias, S* y, T* log_det, Grid grid, bool inverse) {
  if (grid.shape.total() > 0) {
    const ThreadAffines<Grid, T> affine(grid, log_scale, bias, inverse);
    grid.walk([&](int64_t offset, int low, int high) {
      T values[Grid::vector];
      load(x + offset, low, high, values);
#pragma unroll
      for (int i = 0; i < Grid::vector; ++i)
        values[i] = (values[i] - affine[i].center) * affine[i].scale + affine[i].shift;
      store(values, low, high, y + offset);
    });
  }
  if (blockIdx.x == 0) write_log_det(log_scale, log_det, grid.shape, inverse);
}

// grad_x, and the channels' Σ grad_y and Σ grad_y·(x − center) block by block: partial[2][parts][channels].
template <class Grid, class S, class T>
__global__ void __launch_bounds__(kThreads)
    actnorm_backward_kernel(const S* x, const T* log_scale, const T* bias, const S* grad_y, S* grad_x, T* partial,
                            Grid grid, bool inverse) {
  const ThreadAffines<Grid, T> affine(grid, log_scale, bias, inverse);
  T sums[2][Grid::kinds] = {};
  grid.walk([&](int64_t offset, int low, int high) {
    T values[Grid::vector], grads[Grid::vector];
    load(x + offset, low, high, values);
    load(grad_y + offset, low, high, grads);
#pragma unroll
    for (int i = 0; i < Grid::vector; ++i) {
      sums[0][i % Grid::kinds] += grads[i];
      sums[1][i % Grid::kinds] += grads[i] * (values[i] - affine[i].center);
      grads[i] *= affine[i].scale;
    }
    store(grads, low, high, grad_x + offset);
  });
  store_channel_sums(grid, sums, partial);
}

// One block per channel: the parts in order, then the chain rule through e^±s, and the log-det's share.
template <class T>
__global__ void __launch_bounds__(kThreads)
    actnorm_channel_gradients_kernel(const T* log_scale, const T* partial, int64_t parts, const T* grad_log_det,
                                     T* grad_log_scale, T* grad_bias, ChannelShape shape, bool inverse) {
  const int64_t c = blockIdx.x;
  double sums[2] = {}, from_log_det = 0;
  for (int64_t part = threadIdx.x; part < parts; part += kThreads)
    for (int q = 0; q < 2; ++q) sums[q] += static_cast<double>(partial[(q * parts + part) * shape.channels + c]);
  for (int64_t b = threadIdx.x; b < shape.samples; b += kThreads) from_log_det += static_cast<double>(grad_log_det[b]);
  for (double& sum : sums) sum = block_sum(sum);
  from_log_det = block_sum(from_log_det) * static_cast<double>(shape.pixels);
  if (threadIdx.x != 0) return;
  const double scale = static_cast<double>(math::exp(inverse ? -log_scale[c] : log_scale[c]));
  grad_log_scale[c] = static_cast<T>((inverse ? -1.0 : 1.0) * (scale * sums[1] + from_log_det));
  grad_bias[c] = static_cast<T>(inverse ? -scale * sums[0] : sums[0]);
}

// ---- Launches ----

// S is the type of x, y and their gradients; T, float or double, of all else. x and y are dense in one format.
template <class S, class T>
cudaError_t actnorm_forward(const S* x, const T* log_scale, const T* bias, S* y, T* log_det, const ChannelShape& shape,
                            bool inverse, cudaStream_t stream) {
  return with_channel_grid<S>(shape, aligned(x) && aligned(y), [&](auto grid) {
    using Grid = decltype(grid);
    return launch(actnorm_forward_kernel<Grid, S, T>, grid.blocks(), stream, x, log_scale, bias, y, log_det, grid,
                  inverse);
  });
}

// How many T actnorm_backward needs in `partial`.
template <class S>
int64_t actnorm_partial_size(const ChannelShape& shape, bool is_aligned) {
  return 2 * channel_sums_size<S>(shape, is_aligned);
}

template <class S, class T>
cudaError_t actnorm_backward(const S* x, const T* log_scale, const T* bias, const S* grad_y, const T* grad_log_det,
                             S* grad_x, T* grad_log_scale, T* grad_bias, T* partial, const ChannelShape& shape,
                             bool inverse, cudaStream_t stream) {
  if (shape.channels == 0) return cudaSuccess;
  int64_t parts = 0;
  if (shape.total() > 0) {
    const bool is_aligned = aligned(x) && aligned(grad_y) && aligned(grad_x);
    const cudaError_t error = with_channel_grid<S>(shape, is_aligned, [&](auto grid) {
      using Grid = decltype(grid);
      const int64_t blocks = grid.blocks();
      parts = grid.parts(blocks, shape.channels);
      return launch(actnorm_backward_kernel<Grid, S, T>, blocks, stream, x, log_scale, bias, grad_y, grad_x, partial,
                    grid, inverse);
    });
    if (error != cudaSuccess) return error;
  }
  return launch(actnorm_channel_gradients_kernel<T>, shape.channels, stream, log_scale, partial, parts, grad_log_det,
                grad_log_scale, grad_bias, shape, inverse);
}

}  // namespace hflow::cuda
