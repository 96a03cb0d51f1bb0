// flow_step on CUDA: coupling, then y = W u + b per pixel, up to 32 channels, and its backward. Torch-free: raw
// pointers and a stream.
//
// A block of 128 threads works on one tile of pixels at a time (channel_mix.cuh), which is whole samples or a part of
// one. x is coupled on its way into shared memory, in the order of memory: what meets it from raw are vectors, too,
// wherever raw's channels allow. Forward reads x and the active elements' raw values and writes y; backward reads x,
// raw and grad_y and writes grad_x and grad_raw, and recomputes u on the way. The scale map and the other options are
// branches per vector, the same for a whole grid, so kernels differ in types and format only.
// The log-det: one sum per tile, or per sample of a tile; where a sample has several tiles, a second small kernel adds
// theirs in order.
#pragma once

#include "common/coupling_geometry.h"
#include "cuda/channel_mix.cuh"
#include "cuda/channel_sums.cuh"
#include "cuda/coupling_math.cuh"
#include "cuda/partial_sums.cuh"

namespace hflow::cuda {

// Elements that backward couples at a time: 16 bytes of a half type are too many for the registers.
template <class S>
inline constexpr int kBackwardVector = kVector<S> > 4 ? 4 : kVector<S>;

template <class T>
struct FlowStepOptions {
  CouplingGeometry geometry;
  CouplingMath<T> math;
  bool raw_vectors;  // a vector of x meets vectors of raw
  Divisor width;

  FlowStepOptions(const CouplingOptions& options, const CouplingGeometry& geometry)
      : geometry(geometry),
        math(options),
        raw_vectors(false),
        width(geometry.width) {}

  // Whether vectors of `vector` channels of a pixel do.
  bool divides_channels(int vector) const {
    const CouplingGeometry& g = geometry;
    return g.raw_step == 1 && g.channels % vector == 0 && g.passive % vector == 0 && g.raw_channels % vector == 0 &&
           g.first_scale % vector == 0 && g.first_shift % vector == 0;
  }

  __device__ bool active(const TilePlace& place) const {
    if (!geometry.spatial) return geometry.active_channel(place.channel);
    const int64_t row = width.divide(place.sample_pixel);
    return geometry.active_pixel(row, place.sample_pixel - row * width.value());
  }
};

// A vector's scales and shifts.
template <class Format, int V, class R, class T>
struct RawVector {
  T scales[V], shifts[V];  // 0 where passive
  unsigned active;         // bit k: element k is transformed

  __device__ __forceinline__ RawVector(const R* raw, const MixTiling& tiling, const FlowStepOptions<T>& options,
                                       TilePlace place)
      : active(0) {
    const CouplingGeometry& g = options.geometry;
    R s[V], t[V];
    if (V == 1 || Format::kWholeVectors || options.raw_vectors) {
      const TilePlace first = place;
#pragma unroll
      for (int k = 0; k < V; ++k, Format::advance(tiling, place))
        if (k < place.count && options.active(place)) active |= 1u << k;
      if (active != 0) {
        load_packed<V>(raw + Format::offset(tiling, first, g.raw_channels, g.shift_channel(first.channel)), t);
        if (g.scales)
          load_packed<V>(raw + Format::offset(tiling, first, g.raw_channels, g.scale_channel(first.channel)), s);
      }
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k, Format::advance(tiling, place)) {
        if (k >= place.count || !options.active(place)) continue;
        active |= 1u << k;
        t[k] = raw[Format::offset(tiling, place, g.raw_channels, g.shift_channel(place.channel))];
        if (g.scales) s[k] = raw[Format::offset(tiling, place, g.raw_channels, g.scale_channel(place.channel))];
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      scales[k] = is_active(k) && g.scales ? to_compute<T>(s[k]) : T(0);
      shifts[k] = is_active(k) ? to_compute<T>(t[k]) : T(0);
    }
  }

  __device__ __forceinline__ bool is_active(int k) const { return active >> k & 1; }

  // Writes the gradients of all that raw holds for the vector's elements.
  __device__ __forceinline__ static void store(const T (&grad_scales)[V], const T (&grad_shifts)[V], R* grad_raw,
                                               const MixTiling& tiling, const FlowStepOptions<T>& options,
                                               TilePlace place) {
    const CouplingGeometry& g = options.geometry;
    R s[V], t[V];
#pragma unroll
    for (int k = 0; k < V; ++k) s[k] = to_memory<R>(grad_scales[k]), t[k] = to_memory<R>(grad_shifts[k]);
    if (V == 1 || Format::kWholeVectors || options.raw_vectors) {
      if (place.count == 0 || !g.has_raw(place.channel)) return;
      store_packed<V>(t, grad_raw + Format::offset(tiling, place, g.raw_channels, g.shift_channel(place.channel)));
      if (g.scales)
        store_packed<V>(s, grad_raw + Format::offset(tiling, place, g.raw_channels, g.scale_channel(place.channel)));
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k, Format::advance(tiling, place)) {
        if (k >= place.count || !g.has_raw(place.channel)) continue;
        grad_raw[Format::offset(tiling, place, g.raw_channels, g.shift_channel(place.channel))] = t[k];
        if (g.scales) grad_raw[Format::offset(tiling, place, g.raw_channels, g.scale_channel(place.channel))] = s[k];
      }
    }
  }
};

// u into tile 0, and the log-scales: their sum for this thread, or (several samples) each into tile 1.
template <int V, class Format, class S, class R, class T>
__device__ T couple_tile(const S* x, const R* raw, const MixTiling& tiling, const TileSpan& span,
                         const FlowStepOptions<T>& options, const MixMemory<Format, T>& memory) {
  T sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < mix_vectors<V>(tiling); i += kMixThreads) {
    const TilePlace place = Format::template place<V>(tiling, span, i);
    T values[V], log_scales[V];
    S packed[V];
    mix_read<Format>(x + Format::offset(tiling, place, tiling.shape.channels, place.channel), place.count, packed);
    const RawVector<Format, V, R, T> from(raw, tiling, options, place);
    mix_unpack(packed, values);
    if (from.active != 0) {
      T u[V];
      options.math.forward(values, from.scales, from.shifts, u, log_scales);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        values[k] = from.is_active(k) ? u[k] : values[k];
        log_scales[k] = from.is_active(k) ? log_scales[k] : T(0);
        sum += log_scales[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) log_scales[k] = T(0);
    }
    memory.put(0, place, values);
    if (tiling.samples_per_tile > 1) memory.put(1, place, log_scales);
  }
  return sum;
}

// The log-dets of a tile's samples, from tile 1: several threads per sample where there are enough.
template <class Format, class T>
__device__ void sum_samples(const MixTiling& tiling, const TileSpan& span, const MixMemory<Format, T>& memory,
                            T* log_det) {
  int lanes = 32;
  while (lanes > 1 && lanes * tiling.samples_per_tile > kMixThreads) lanes /= 2;
  const int pixels = static_cast<int>(tiling.shape.pixels), lane = static_cast<int>(threadIdx.x) % lanes;
  for (int first = 0; first < tiling.samples_per_tile; first += kMixThreads / lanes) {
    const int sample = first + static_cast<int>(threadIdx.x) / lanes;
    T sum = 0;
    if (sample * pixels < span.pixels) {
      for (int i = lane; i < tiling.shape.channels * pixels; i += lanes) {
        const int channel = static_cast<int>(tiling.pixels.divide(i));
        sum += (*memory)[memory.row(1, channel) + sample * pixels + i - channel * pixels];
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(kWholeWarp, sum, offset, lanes);
    if (lane == 0 && sample * pixels < span.pixels) log_det[span.sample + sample] = sum;
  }
}

// `log_det` per sample where tiles are not parts of samples, else per tile.
template <class Format, class S, class R, class T>
__global__ void __launch_bounds__(kMixThreads)
    flow_step_forward_kernel(const S* x, const R* raw, const T* weight, const T* bias, S* y, T* log_det,
                             MixTiling tiling, FlowStepOptions<T> options) {
  const MixMemory<Format, T> memory(tiling);
  const TileSpan span = tiling.span(blockIdx.x);
  memory.fill(weight, true, bias);
  const T sum = tiling.wide ? couple_tile<kVector<S>>(x, raw, tiling, span, options, memory)
                            : couple_tile<1>(x, raw, tiling, span, options, memory);
  __syncthreads();
  if (tiling.samples_per_tile > 1) {
    sum_samples(tiling, span, memory, log_det);
  } else {
    const T total = block_sum<kMixThreads>(sum);
    if (threadIdx.x == 0) log_det[blockIdx.x] = total;
  }
  MixOutputs<T> outputs;
  outputs.compute(tiling, memory, 0);
  __syncthreads();
  outputs.put(tiling, memory, 0);
  __syncthreads();
  tiling.wide ? mix_store<kVector<S>>(memory, 0, tiling, span, y) : mix_store<1>(memory, 0, tiling, span, y);
}

// From grad_u in tile 1: grad_x, grad_raw, and u into tile 1.
template <int V, class Format, class S, class R, class T>
__device__ void couple_tile_backward(const S* x, const R* raw, const T* grad_log_det, S* grad_x, R* grad_raw,
                                     const MixTiling& tiling, const TileSpan& span, const FlowStepOptions<T>& options,
                                     const MixMemory<Format, T>& memory) {
#pragma unroll 1
  for (int i = threadIdx.x; i < mix_vectors<V>(tiling); i += kMixThreads) {
    const TilePlace place = Format::template place<V>(tiling, span, i);
    const int64_t offset = Format::offset(tiling, place, tiling.shape.channels, place.channel);
    T values[V], grads[V], grad_scales[V] = {}, grad_shifts[V] = {};
    S packed[V];
    mix_read<Format>(x + offset, place.count, packed);
    const RawVector<Format, V, R, T> from(raw, tiling, options, place);
    mix_unpack(packed, values);
    memory.get(1, place, grads);
    if (from.active != 0) {
      T of_log_det[V], u[V], grad_values[V], of_scales[V], of_shifts[V];
      TilePlace element = place;
#pragma unroll
      for (int k = 0; k < V; ++k, Format::advance(tiling, element))
        of_log_det[k] = from.is_active(k) ? grad_log_det[element.sample] : T(0);
      options.math.backward(values, from.scales, from.shifts, grads, of_log_det, u, grad_values, of_scales, of_shifts);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (!from.is_active(k)) continue;
        values[k] = u[k], grads[k] = grad_values[k], grad_scales[k] = of_scales[k], grad_shifts[k] = of_shifts[k];
      }
    }
    mix_write<Format>(grads, place.count, grad_x + offset);
    from.store(grad_scales, grad_shifts, grad_raw, tiling, options, place);
    memory.put(1, place, values);
  }
}

// grad_u = Wᵀ grad_y goes through the coupling; block by block the sums for W and b: partial[blocks][channels² +
// channels]. Three blocks on a multiprocessor: for four, the sums of a thread would not stay in registers.
template <class Format, class S, class R, class T>
__global__ void __launch_bounds__(kMixThreads, std::is_same_v<T, double> ? 2 : 3)
    flow_step_backward_kernel(const S* x, const R* raw, const T* weight, const S* grad_y, const T* grad_log_det,
                              S* grad_x, R* grad_raw, T* partial, MixTiling tiling, FlowStepOptions<T> options) {
  const MixMemory<Format, T> memory(tiling);
  MixSums<Format, T> sums(tiling);
  memory.fill(weight, false, nullptr);
  for (int64_t tile = blockIdx.x; tile < tiling.tiles(); tile += gridDim.x) {
    const TileSpan span = tiling.span(tile);
    tiling.wide ? mix_load<kVector<S>>(grad_y, tiling, span, memory, 0)
                : mix_load<1>(grad_y, tiling, span, memory, 0);
    __syncthreads();
    MixOutputs<T> outputs;
    outputs.compute(tiling, memory, 0);
    outputs.put(tiling, memory, 1);
    __syncthreads();
    if (tiling.wide)
      couple_tile_backward<kBackwardVector<S>>(x, raw, grad_log_det, grad_x, grad_raw, tiling, span, options, memory);
    else
      couple_tile_backward<1>(x, raw, grad_log_det, grad_x, grad_raw, tiling, span, options, memory);
    __syncthreads();
    sums.add(tiling, span, memory);
    __syncthreads();
  }
  sums.finish(tiling, memory,
              partial + blockIdx.x * (tiling.shape.channels * tiling.shape.channels + tiling.shape.channels));
}

// ---- Launches ----

// How many T flow_step_forward needs in `partial`.
template <class S>
int64_t flow_step_forward_partial_size(const MixShape& shape) {
  if (shape.total() == 0) return 0;
  const MixTiling tiling = MixTiling::of<S>(shape, false, false);
  return tiling.tiles_per_sample > 1 ? tiling.tiles() : 0;
}

// S is the type of x, y and their gradients, R that of raw and its gradient; T, float or double, of all else. x and raw
// are dense in one format; `geometry` belongs to their shapes.
template <class S, class R, class T>
cudaError_t flow_step_forward(const S* x, const R* raw, const T* weight, const T* bias, S* y, T* log_det, T* partial,
                              const MixShape& shape, const CouplingOptions& options, const CouplingGeometry& geometry,
                              cudaStream_t stream) {
  if (shape.samples == 0) return cudaSuccess;
  int64_t tiles = 0;
  if (shape.total() > 0) {
    const auto tiling = MixTiling::of<S>(shape, false, aligned(x) && aligned(raw) && aligned(y));
    FlowStepOptions<T> step(options, geometry);
    step.raw_vectors = step.divides_channels(kVector<S>);
    tiles = tiling.tiles_per_sample;
    const auto run = [&](auto format) {
      using Format = decltype(format);
      const int shared = MixMemory<Format, T>::bytes(tiling, tiling.samples_per_tile > 1 ? 2 : 1);
      return launch(flow_step_forward_kernel<Format, S, R, T>, LaunchShape(tiling.tiles(), kMixThreads, shared), stream,
                    x, raw, weight, bias, y, tiles > 1 ? partial : log_det, tiling, step);
    };
    const cudaError_t error = shape.by_rows ? run(MixRows{}) : run(MixPixels{});
    if (error != cudaSuccess || tiles == 1) return error;
  }
  return add_partial_sums(partial, shape.samples, tiles, log_det, stream);
}

// How many T flow_step_backward needs in `partial`.
template <class S>
int64_t flow_step_backward_partial_size(const MixShape& shape) {
  return shape.total() == 0 ? 0 : mix_partial_size(MixTiling::of<S>(shape, false, false));
}

template <class S, class R, class T>
cudaError_t flow_step_backward(const S* x, const R* raw, const T* weight, const S* grad_y, const T* grad_log_det,
                               S* grad_x, R* grad_raw, T* grad_weight, T* grad_bias, T* partial, const MixShape& shape,
                               const CouplingOptions& options, const CouplingGeometry& geometry, cudaStream_t stream) {
  if (shape.channels == 0) return cudaSuccess;
  int64_t blocks = 0;
  if (shape.total() > 0) {
    const bool is_aligned =
        aligned(x) && aligned(raw) && aligned(grad_y) && aligned(grad_x) && aligned(grad_raw);
    const auto tiling = MixTiling::of<S>(shape, false, is_aligned);
    FlowStepOptions<T> step(options, geometry);
    step.raw_vectors = step.divides_channels(kBackwardVector<S>);
    blocks = mix_backward_blocks(tiling);
    const auto run = [&](auto format) {
      using Format = decltype(format);
      const LaunchShape grid(blocks, kMixThreads, MixMemory<Format, T>::bytes(tiling, 2));
      return launch(flow_step_backward_kernel<Format, S, R, T>, grid, stream, x, raw, weight, grad_y, grad_log_det,
                    grad_x, grad_raw, partial, tiling, step);
    };
    const cudaError_t error = shape.by_rows ? run(MixRows{}) : run(MixPixels{});
    if (error != cudaSuccess) return error;
  }
  return mix_gradients(partial, blocks, shape.channels, grad_weight, grad_bias, stream);
}

}  // namespace hflow::cuda
