// bias_act on CUDA: y = (a(x + b) + residual)·gain with one bias per channel, and backward. Torch-free.
//
// Bound by memory: forward reads x and the residual and writes y; backward reads x and grad_y and writes grad_x and, if
// there is a residual, its gradient; all in 16-byte accesses of channel_grid.cuh. The bias's gradient goes through one
// partial sum per block and a second small kernel: no atomics. The activation is chosen at run time: a branch that all
// threads take alike costs nothing beside memory, and there are a third of the kernels to compile.
#pragma once

#include "cuda/channel_grid.cuh"
#include "network_formulas.h"

namespace hflow::cuda {

// S is the type of x, residual, y and their gradients, T, float or double, of all else.
template <class S, class T>
struct BiasAct {
  const S* x;
  const T* bias;      // null: none
  const S* residual;  // null: none
  Activation activation;
  T slope, gain;
};

template <class Grid, class S, class T>
struct ThreadBiases {
  T of_kind[Grid::kinds];

  __device__ ThreadBiases(const Grid& grid, const T* bias) {
#pragma unroll
    for (int i = 0; i < Grid::kinds; ++i) of_kind[i] = bias == nullptr ? T(0) : bias[grid.channel(i)];
  }
  __device__ T operator[](int i) const { return of_kind[i % Grid::kinds]; }
};

template <class Grid, class S, class T>
__global__ void __launch_bounds__(kThreads) bias_act_forward_kernel(BiasAct<S, T> op, S* y, Grid grid) {
  constexpr int V = Grid::vector;
  const ThreadBiases<Grid, S, T> bias(grid, op.bias);
  grid.walk([&](int64_t offset, int low, int high) {
    T values[V], merged[V] = {};
    load(op.x + offset, low, high, values);
    if (op.residual != nullptr) load(op.residual + offset, low, high, merged);
    visit_activation(op.activation, [&](auto a) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        values[i] = hflow::bias_act<decltype(a)>(values[i], bias[i], merged[i], op.slope, op.gain);
    });
    store(values, low, high, y + offset);
  });
}

// grad_residual and partial may be null; partial[parts][channels] are the sums of grad_x, block by block.
template <class Grid, class S, class T>
__global__ void __launch_bounds__(kThreads, 4)  // four blocks per SM leave enough registers for eight elements
    bias_act_backward_kernel(BiasAct<S, T> op, const S* grad_y, S* grad_x, S* grad_residual, T* partial, Grid grid) {
  constexpr int V = Grid::vector;
  const ThreadBiases<Grid, S, T> bias(grid, op.bias);
  T sums[1][Grid::kinds] = {};
  grid.walk([&](int64_t offset, int low, int high) {
    T values[V], grads[V];
    load(op.x + offset, low, high, values);
    load(grad_y + offset, low, high, grads);  // zeros outside
    visit_activation(op.activation, [&](auto a) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        values[i] = hflow::bias_act_backward<decltype(a)>(values[i], bias[i], grads[i], op.slope, op.gain);
    });
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[0][i % Grid::kinds] += values[i];
      grads[i] *= op.gain;
    }
    store(values, low, high, grad_x + offset);
    if (grad_residual != nullptr) store(grads, low, high, grad_residual + offset);
  });
  if (partial != nullptr) store_channel_sums(grid, sums, partial);
}

// One block per channel adds the parts in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_act_bias_gradient_kernel(const T* partial, int64_t parts, T* grad_bias, int64_t channels) {
  double sum = 0;
  for (int64_t part = threadIdx.x; part < parts; part += kThreads)
    sum += static_cast<double>(partial[part * channels + blockIdx.x]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) grad_bias[blockIdx.x] = static_cast<T>(sum);
}

// ---- Launches ----

// Without a bias, channels do not matter: all of x is one row.
inline ChannelShape shape_for(const ChannelShape& shape, bool biased) {
  return biased ? shape : ChannelShape{1, 1, shape.total(), true};
}

template <class S, class T>
cudaError_t bias_act_forward(const BiasAct<S, T>& op, S* y, const ChannelShape& shape, cudaStream_t stream) {
  if (shape.total() == 0) return cudaSuccess;
  const bool is_aligned = aligned(op.x) && aligned(op.residual) && aligned(y);
  return with_channel_grid<S>(shape_for(shape, op.bias != nullptr), is_aligned, [&](auto grid) {
    using Grid = decltype(grid);
    return launch(bias_act_forward_kernel<Grid, S, T>, grid.blocks(), stream, op, y, grid);
  });
}

// grad_bias is null where there is no bias, grad_residual where there is no residual; `partial` has
// channel_sums_size<S>(shape, all pointers aligned) elements for the former.
template <class S, class T>
cudaError_t bias_act_backward(const BiasAct<S, T>& op, const S* grad_y, S* grad_x, S* grad_residual, T* grad_bias,
                              T* partial, const ChannelShape& shape, cudaStream_t stream) {
  if (shape.channels == 0) return cudaSuccess;
  int64_t parts = 0;
  if (shape.total() > 0) {
    const bool is_aligned = aligned(op.x) && aligned(grad_y) && aligned(grad_x) && aligned(grad_residual);
    const cudaError_t error =
        with_channel_grid<S>(shape_for(shape, op.bias != nullptr), is_aligned, [&](auto grid) {
          using Grid = decltype(grid);
          const int64_t blocks = grid.blocks();
          parts = grid.parts(blocks, grid.shape.channels);
          return launch(bias_act_backward_kernel<Grid, S, T>, blocks, stream, op, grad_y, grad_x, grad_residual,
                        grad_bias == nullptr ? nullptr : partial, grid);
        });
    if (error != cudaSuccess || grad_bias == nullptr) return error;
  }
  if (grad_bias == nullptr) return cudaSuccess;
  return launch(bias_act_bias_gradient_kernel<T>, shape.channels, stream, partial, parts, grad_bias, shape.channels);
}

}  // namespace hflow::cuda
