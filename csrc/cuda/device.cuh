// What the CUDA kernels share: 16-byte accesses, block-wide sums. Free of torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/shared.cuh"

namespace hflow::cuda {

// The most elements of S that one instruction moves.
template <class S>
inline constexpr int kVector = 16 / sizeof(S);

// Between memory type S and compute type T, by name: torch's build switches the half types' own conversions off.
template <class T, class S>
__device__ __forceinline__ T to_compute(S value) {
  if constexpr (std::is_same_v<S, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <class S, class T>
__device__ __forceinline__ S to_memory(T value) {
  if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// Elements [low, high) of V consecutive ones as compute type T, zeros for the others. All V go through one instruction
// if V = kVector<S>, for which the pointer must be 16-byte aligned.
template <int V, class T, class S>
__device__ __forceinline__ void load(const S* __restrict__ from, int low, int high, T (&values)[V]) {
  if (V == kVector<S> && low == 0 && high == V) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    S elements[kVector<S>];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = to_compute<T>(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = i >= low && i < high ? to_compute<T>(from[i]) : T(0);
  }
}

template <int V, class T, class S>
__device__ __forceinline__ void store(const T (&values)[V], int low, int high, S* __restrict__ to) {
  if (V == kVector<S> && low == 0 && high == V) {
    S elements[kVector<S>];
#pragma unroll
    for (int i = 0; i < V; ++i) elements[i] = to_memory<S>(values[i]);
    uint4 raw;
    memcpy(&raw, elements, sizeof(raw));
    *reinterpret_cast<uint4*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i >= low && i < high) to[i] = to_memory<S>(values[i]);
  }
}

// V elements as they are, all through one instruction; the pointer must be aligned to their V·sizeof(S) bytes. (nvcc
// sometimes splits a plain store of 16 bytes, so it is asked for by name: write-back is what plain stores do.)
template <int V, class S>
__device__ __forceinline__ void load_packed(const S* from, S* values) {
  if constexpr (V == 1) {
    *values = *from;
  } else {
    using Pack = std::conditional_t<V * sizeof(S) == 16, uint4, uint2>;
    static_assert(sizeof(Pack) == V * sizeof(S), "8 or 16 bytes");
    const Pack pack = *reinterpret_cast<const Pack*>(from);
    memcpy(values, &pack, sizeof(pack));
  }
}

template <int V, class S>
__device__ __forceinline__ void store_packed(const S* values, S* to) {
  if constexpr (V == 1) {
    *to = *values;
  } else {
    using Pack = std::conditional_t<V * sizeof(S) == 16, uint4, uint2>;
    static_assert(sizeof(Pack) == V * sizeof(S), "8 or 16 bytes");
    Pack pack;
    memcpy(&pack, values, sizeof(pack));
    __stwb(reinterpret_cast<Pack*>(to), pack);
  }
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over a warp, always in the same order; valid in lane 0. Every lane of the warp calls it.
template <class T>
__device__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(kWholeWarp, value, offset);
  return value;
}

// The sum over a block of Threads, always in the same order, in every thread. Every thread of the block calls it.
template <int Threads = kThreads, class T>
__device__ T block_sum(T value) {
  constexpr int warps = Threads / 32;
  __shared__ SharedArray<T, warps> partial;
  __syncthreads();  // a previous sum may still be read
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  T total = partial[0];
  for (int warp = 1; warp < warps; ++warp) total += partial[warp];
  return total;
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace hflow::cuda
