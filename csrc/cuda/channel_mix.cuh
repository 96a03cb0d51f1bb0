// The channel affine y = W x + b of a tile of pixels: shared by conv1x1.cuh and flow_step.cuh, up to 32 channels. Free of
// torch.
//
// Eight output channels × a few pixels per thread: every value read from shared memory meets several others, or its
// bandwidth would be the limit from 16 channels on. Nothing moves to or from device memory here.
#pragma once

#include "cuda/channel_tile.cuh"

namespace hflow::cuda {

// A thread's output channels of its pixels.
template <class T>
struct MixOutputs {
  T values[kMixOutputs][kMixPixels<T>];

  // From all rows of a tile.
  template <class Format>
  __device__ void compute(const MixTiling& tiling, const MixMemory<Format, T>& memory, int tile) {
    constexpr int N = kVector<T>;
    const int first = tiling.first_output(), pixel = tiling.first_pixel(), lanes = tiling.pixel_lanes();
    if (first >= tiling.shape.channels) return;
    T weights[kMixOutputs];
    const auto load_weights = [&](int row) {
#pragma unroll
      for (int o = 0; o < kMixOutputs; o += N) {
        T part[N];
        (*memory).load(row * tiling.size + first + o, part);
#pragma unroll
        for (int i = 0; i < N; ++i) weights[o + i] = part[i];
      }
    };
    load_weights(tiling.shape.channels);
#pragma unroll
    for (int o = 0; o < kMixOutputs; ++o)
#pragma unroll
      for (int i = 0; i < kMixPixels<T>; ++i) values[o][i] = weights[o];
#pragma unroll 2
    for (int c = 0; c < tiling.shape.channels; ++c) {
      load_weights(c);
      const int row = memory.row(tile, c) + pixel;
#pragma unroll
      for (int i = 0; i < kMixPixels<T>; ++i) {
        const T x = (*memory)[row + i * lanes];
#pragma unroll
        for (int o = 0; o < kMixOutputs; ++o) values[o][i] += weights[o] * x;
      }
    }
  }

  template <class Format>
  __device__ void put(const MixTiling& tiling, const MixMemory<Format, T>& memory, int tile) const {
    const int first = tiling.first_output(), pixel = tiling.first_pixel(), lanes = tiling.pixel_lanes();
#pragma unroll
    for (int o = 0; o < kMixOutputs; ++o) {
      if (first + o >= tiling.shape.channels) break;
      const int row = memory.row(tile, first + o) + pixel;
#pragma unroll
      for (int i = 0; i < kMixPixels<T>; ++i) (*memory)[row + i * lanes] = values[o][i];
    }
  }
};

}  // namespace hflow::cuda
