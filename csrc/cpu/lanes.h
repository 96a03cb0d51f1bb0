// A vector register of floats, for leaves that are written in vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/isa.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions that are always inlined

namespace hflow {

inline constexpr int64_t kWidest = 16;  // floats in a vector of AVX-512

// A multiple of every vector's floats.
inline constexpr int64_t padded(int64_t floats) { return (floats + kWidest - 1) / kWidest * kWidest; }

template <int Bytes>
struct Lanes {
  typedef float Vector __attribute__((vector_size(Bytes)));
  static constexpr int64_t kWidth = Bytes / sizeof(float);

  HFLOW_LEAF Vector load(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, Bytes);
    return vector;
  }
  HFLOW_LEAF void store(float* to, Vector vector) { std::memcpy(to, &vector, Bytes); }

  // The first `count` lanes, if there are fewer than all; the others are 0.
  HFLOW_LEAF Vector load(const float* from, int64_t count) {
    if (count >= kWidth) return load(from);
    Vector vector{};
    std::memcpy(&vector, from, count * sizeof(float));
    return vector;
  }
  HFLOW_LEAF void store(float* to, Vector vector, int64_t count) {
    std::memcpy(to, &vector, std::min<int64_t>(count, kWidth) * sizeof(float));
  }
};

}  // namespace hflow
