// What kernels and their tests use of CUDA, for a C++ compiler. Device memory is host memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using Index3 = emulator::Index;
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

// ---- Vector types, aligned as on the device: UBSan then finds a misaligned access ----

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

// ---- Device functions ----

inline void __syncthreads() { emulator::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(emulator::WarpOp::sync, mask, 0, 0); }

namespace emulator {
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(WarpOp::shuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int lane() { return static_cast<int>(threadIdx.x % 32); }
// A source outside the caller's group of `width` lanes means the caller itself.
inline int within(int source, int width) { return source / width == lane() / width && source >= 0 ? source : lane(); }
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator::shuffle(mask, value, emulator::lane() / width * width + source % width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  return emulator::shuffle(mask, value, emulator::within(emulator::lane() + delta, width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  return emulator::shuffle(mask, value, emulator::within(emulator::lane() - delta, width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulator::shuffle(mask, value, emulator::within(emulator::lane() ^ bits, width));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulator::exchange(emulator::WarpOp::vote, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
void __stwb(T* pointer, T value) {
  *pointer = value;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

// ---- The runtime ----

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  *pointer = static_cast<T*>(std::malloc(bytes));
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) { return std::free(pointer), cudaSuccess; }
inline cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return std::memset(pointer, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
