// Shared memory as kernels use it. (The block emulator of cuda_tests has its own version of this file, which checks
// bounds, initialisation and races: so kernels declare no bare __shared__ arrays.)
//
//   __shared__ SharedArray<float, 256> tile;        fixed size
//   DynamicShared<double> rows = dynamic_shared<double>();   LaunchShape::shared_bytes, one array per kernel
//
// Elements are read into variables of type T, not `auto`: the emulator's operator[] returns a checking reference.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace hflow::cuda {

template <class T>
class SharedSpan {
 public:
  __device__ explicit SharedSpan(T* values) : values_(values) {}
  __device__ T& operator[](int i) const { return values_[i]; }

  // Elements [i, i + V): one instruction where they fill 16 aligned bytes.
  template <int V>
  __device__ void load(int i, T (&to)[V]) const {
    if constexpr (V * sizeof(T) == 16) {
      const uint4 raw = *reinterpret_cast<const uint4*>(values_ + i);
      memcpy(to, &raw, sizeof(raw));
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) to[k] = values_[i + k];
    }
  }
  template <int V>
  __device__ void store(int i, const T (&from)[V]) const {
    if constexpr (V * sizeof(T) == 16) {
      uint4 raw;
      memcpy(&raw, from, sizeof(raw));
      *reinterpret_cast<uint4*>(values_ + i) = raw;
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) values_[i + k] = from[k];
    }
  }

 private:
  T* values_;
};

template <class T, int N>
class SharedArray {
 public:
  __device__ T& operator[](int i) { return values_[i]; }
  template <int V>
  __device__ void load(int i, T (&to)[V]) {
    span().load(i, to);
  }
  template <int V>
  __device__ void store(int i, const T (&from)[V]) {
    span().store(i, from);
  }
  __device__ SharedSpan<T> span() { return SharedSpan<T>(values_); }

 private:
  alignas(16) T values_[N];
};

template <class T>
using DynamicShared = SharedSpan<T>;

extern __shared__ uint4 dynamic_shared_memory[];

template <class T>
__device__ DynamicShared<T> dynamic_shared() {
  return DynamicShared<T>(reinterpret_cast<T*>(dynamic_shared_memory));
}

}  // namespace hflow::cuda
