// conv1x1 on CUDA: y = W x + b per pixel, up to 32 channels, and its backward. Torch-free: raw pointers and a stream.
//
// A block of 128 threads works on one tile of pixels at a time (channel_mix.cuh): memory → shared memory → registers →
// shared memory → memory. Forward reads x and writes y, one tile per block. Backward reads x and grad_y and writes
// grad_x; its blocks go over many tiles and keep the sums for W and b in registers. Bound by memory for up to about 16
// channels; with 32, shared memory and arithmetic take as long as an H100's memory does, not an RTX 3090's.
#pragma once

#include "cuda/channel_mix.cuh"
#include "cuda/channel_sums.cuh"

namespace hflow::cuda {

template <class Format, class S, class T>
__global__ void __launch_bounds__(kMixThreads)
    conv1x1_forward_kernel(const S* x, const T* weight, const T* bias, S* y, MixTiling tiling) {
  const MixMemory<Format, T> memory(tiling);
  const TileSpan span = tiling.span(blockIdx.x);
  memory.fill(weight, true, bias);
  tiling.wide ? mix_load<kVector<S>>(x, tiling, span, memory, 0) : mix_load<1>(x, tiling, span, memory, 0);
  __syncthreads();
  MixOutputs<T> outputs;
  outputs.compute(tiling, memory, 0);
  __syncthreads();
  outputs.put(tiling, memory, 0);
  __syncthreads();
  tiling.wide ? mix_store<kVector<S>>(memory, 0, tiling, span, y) : mix_store<1>(memory, 0, tiling, span, y);
}

// grad_x = Wᵀ grad_y, and block by block the sums for W and b: partial[blocks][channels² + channels]. Registers leave
// room for four blocks on a multiprocessor.
template <class Format, class S, class T>
__global__ void __launch_bounds__(kMixThreads, std::is_same_v<T, double> ? 2 : 4)
    conv1x1_backward_kernel(const S* x, const T* weight, const S* grad_y, S* grad_x, T* partial, MixTiling tiling) {
  const MixMemory<Format, T> memory(tiling);
  MixSums<Format, T> sums(tiling);
  memory.fill(weight, false, nullptr);
  for (int64_t tile = blockIdx.x; tile < tiling.tiles(); tile += gridDim.x) {
    const TileSpan span = tiling.span(tile);
    if (tiling.wide) {
      mix_load<kVector<S>>(grad_y, tiling, span, memory, 0);
      mix_load<kVector<S>>(x, tiling, span, memory, 1);
    } else {
      mix_load<1>(grad_y, tiling, span, memory, 0);
      mix_load<1>(x, tiling, span, memory, 1);
    }
    __syncthreads();
    sums.add(tiling, span, memory);
    MixOutputs<T> outputs;
    outputs.compute(tiling, memory, 0);
    __syncthreads();
    outputs.put(tiling, memory, 0);
    __syncthreads();
    tiling.wide ? mix_store<kVector<S>>(memory, 0, tiling, span, grad_x)
                : mix_store<1>(memory, 0, tiling, span, grad_x);
    __syncthreads();
  }
  sums.finish(tiling, memory,
              partial + blockIdx.x * (tiling.shape.channels * tiling.shape.channels + tiling.shape.channels));
}

// ---- Launches ----

// S is the type of x, y and their gradients; T, float or double, of all else. x and y are dense in one format.
template <class S, class T>
cudaError_t conv1x1_forward(const S* x, const T* weight, const T* bias, S* y, const MixShape& shape,
                            cudaStream_t stream) {
  if (shape.total() == 0) return cudaSuccess;
  const auto tiling = MixTiling::of<S>(shape, true, aligned(x) && aligned(y));
  const auto run = [&](auto format) {
    using Format = decltype(format);
    const LaunchShape blocks(tiling.tiles(), kMixThreads, MixMemory<Format, T>::bytes(tiling, 1));
    return launch(conv1x1_forward_kernel<Format, S, T>, blocks, stream, x, weight, bias, y, tiling);
  };
  return shape.by_rows ? run(MixRows{}) : run(MixPixels{});
}

// How many T conv1x1_backward needs in `partial`.
template <class S>
int64_t conv1x1_partial_size(const MixShape& shape) {
  return shape.total() == 0 ? 0 : mix_partial_size(MixTiling::of<S>(shape, true, false));
}

template <class S, class T>
cudaError_t conv1x1_backward(const S* x, const T* weight, const S* grad_y, S* grad_x, T* grad_weight, T* grad_bias,
                             T* partial, const MixShape& shape, cudaStream_t stream) {
  if (shape.channels == 0) return cudaSuccess;
  int64_t blocks = 0;
  if (shape.total() > 0) {
    const auto tiling = MixTiling::of<S>(shape, true, aligned(x) && aligned(grad_y) && aligned(grad_x));
    blocks = mix_backward_blocks(tiling);
    const auto run = [&](auto format) {
      using Format = decltype(format);
      const LaunchShape grid(blocks, kMixThreads, MixMemory<Format, T>::bytes(tiling, 2));
      return launch(conv1x1_backward_kernel<Format, S, T>, grid, stream, x, weight, grad_y, grad_x, partial, tiling);
    };
    const cudaError_t error = shape.by_rows ? run(MixRows{}) : run(MixPixels{});
    if (error != cudaSuccess) return error;
  }
  return mix_gradients(partial, blocks, shape.channels, grad_weight, grad_bias, stream);
}

}  // namespace hflow::cuda
