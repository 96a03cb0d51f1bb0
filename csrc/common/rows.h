// Reading and writing rows of float32, float64, bfloat16 or float16 memory as rows of the compute type T (float or
// double).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/isa.h"

namespace hflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
inline constexpr ScalarType scalar_type_of = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Calls f(S{}) with the C++ type of `type`, which check_floating has accepted.
template <class F>
inline void visit_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    case ScalarType::Half: return f(c10::Half{});
    default: return f(float{});
  }
}

// Calls f(T{}) with the compute type of flow variables of dtype `type`.
template <class F>
inline void visit_compute_type(ScalarType type, const F& f) {
  return type == ScalarType::Double ? f(double{}) : f(float{});
}

// A tensor's memory: what kernels see.
struct Memory {
  void* data;
  ScalarType type;

  static Memory of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.scalar_type()}; }
};

// `outer` runs of `inner` elements: in memory `stride` apart with elements `step` apart, in a buffer dense runs
// `buffer_stride` apart.
struct Runs {
  int64_t outer, inner, stride, step, buffer_stride;
};

namespace detail {

// to[o·to_stride + i·to_step] = from[o·from_stride + i·from_step], converted. The longer loop runs inside: short runs
// (the channels of a pixel) would not fill a vector, nor pay for a loop.
template <class To, class From>
struct Convert {
  HFLOW_LEAF void run(const From* from, To* to, int64_t outer, int64_t inner, int64_t from_stride, int64_t from_step,
                      int64_t to_stride, int64_t to_step) {
    if (inner < outer && inner < 16) {
      swap(outer, inner), swap(from_stride, from_step), swap(to_stride, to_step);
    }
    for (int64_t o = 0; o < outer; ++o, from += from_stride, to += to_stride) {
      // Constant steps vectorise; 2 is the step of a Haar block.
      if (from_step == 1 && to_step == 1) {
        row(from, to, inner, 1, 1);
      } else if (from_step == 2 && to_step == 1) {
        row(from, to, inner, 2, 1);
      } else if (from_step == 1 && to_step == 2) {
        row(from, to, inner, 1, 2);
      } else {
        const From* source = from;
        To* sink = to;
        for (int64_t i = 0; i < inner; ++i, source += from_step, sink += to_step) *sink = static_cast<To>(*source);
      }
    }
  }

 private:
  HFLOW_LEAF void row(const From* from, To* to, int64_t n, int64_t from_step, int64_t to_step) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i * to_step] = static_cast<To>(from[i * from_step]);
  }

  HFLOW_LEAF void swap(int64_t& a, int64_t& b) {
    const int64_t c = a;
    a = b, b = c;
  }
};

// Four chains of 16 lanes, folded pairwise: vectorisable without reassociation, and accurate.
template <class T>
struct Sum {
  HFLOW_LEAF void run(const T* values, int64_t n, double* result) {
    constexpr int lanes = 64;
    T total[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
      for (int j = 0; j < lanes; ++j) total[j] += values[i + j];
    for (int j = 0; i < n; ++i, ++j) total[j] += values[i];
    for (int width = lanes / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) total[j] += total[j + width];
    *result = static_cast<double>(total[0]);
  }
};

}  // namespace detail

template <class T>
inline void gather(Memory from, int64_t offset, T* buffer, Runs runs) {
  visit_type(from.type, [&](auto s) {
    using S = decltype(s);
    run_leaf<detail::Convert<T, S>>(static_cast<const S*>(from.data) + offset, buffer, runs.outer, runs.inner,
                                    runs.stride, runs.step, runs.buffer_stride, int64_t{1});
  });
}

template <class T>
inline void scatter(const T* buffer, Memory to, int64_t offset, Runs runs) {
  visit_type(to.type, [&](auto s) {
    using S = decltype(s);
    run_leaf<detail::Convert<S, T>>(buffer, static_cast<S*>(to.data) + offset, runs.outer, runs.inner,
                                    runs.buffer_stride, int64_t{1}, runs.stride, runs.step);
  });
}

// n elements from `offset`: the memory itself where it already holds T, else converted into the buffer.
template <class T>
inline const T* load(Memory from, int64_t offset, int64_t n, T* buffer) {
  if (from.type == scalar_type_of<T>) return static_cast<const T*>(from.data) + offset;
  gather(from, offset, buffer, {1, n, 0, 1, 0});
  return buffer;
}

// The same for elements `step` apart.
template <class T>
inline const T* load_step(Memory from, int64_t offset, int64_t n, int64_t step, T* buffer) {
  if (step == 1) return load(from, offset, n, buffer);
  gather(from, offset, buffer, {1, n, 0, step, 0});
  return buffer;
}

// Where a leaf should write n elements bound for `offset`; `store` then finishes the job.
template <class T>
inline T* target(Memory to, int64_t offset, T* buffer) {
  return to.type == scalar_type_of<T> ? static_cast<T*>(to.data) + offset : buffer;
}

template <class T>
inline void store(const T* buffer, Memory to, int64_t offset, int64_t n) {
  if (to.type != scalar_type_of<T>) scatter(buffer, to, offset, {1, n, 0, 1, 0});
}

template <class T>
inline double sum(const T* values, int64_t n) {
  double result;
  run_leaf<detail::Sum<T>>(values, n, &result);
  return result;
}

}  // namespace hflow
