// A matrix product in registers, of float32 matrices with any strides: result (+)= left · right.
#pragma once

#include "cpu/lanes.h"

namespace hflow {

inline constexpr int64_t kPanel = 64;  // columns of the right factor that lie side by side

// A matrix in memory: element (row, k) of the left factor, a panel's first in row k of the right one.
struct Left {
  const float* data;
  int64_t row_stride, k_stride;
};
struct Right {
  const float* data;
  int64_t k_stride, panel_stride;
};
struct Result {
  float* data;
  int64_t row_stride;
};

// result (+)= left · right. Blocks of 6 rows by up to 4 vectors (2 where there are 16 registers) stay in registers over
// `at_once` terms, whose part of a panel stays in L1; so sums are short, and rounding stays small, too.
template <int Bytes>
struct Product {
  using L = Lanes<Bytes>;
  using V = typename L::Vector;
  static constexpr int kRows = 6, kVectors = Bytes == 64 ? 4 : 2;

  template <int Rows, int Vectors>
  HFLOW_LEAF void block(Left left, Right right, Result result, int64_t terms, bool add) {
    V sums[Rows][Vectors];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[r][v] = V{};
    for (; terms > 0; --terms, left.data += left.k_stride, right.data += right.k_stride) {
      V factors[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) factors[v] = L::load(right.data + v * L::kWidth);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums[r][v] += left.data[r * left.row_stride] * factors[v];
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        float* to = result.data + r * result.row_stride + v * L::kWidth;
        L::store(to, add ? L::load(to) + sums[r][v] : sums[r][v]);
      }
  }

  template <int Vectors>
  HFLOW_LEAF void columns(Left left, Right right, Result result, int64_t rows, int64_t terms, bool add) {
    for (; rows >= kRows; rows -= kRows) {
      block<kRows, Vectors>(left, right, result, terms, add);
      left.data += kRows * left.row_stride, result.data += kRows * result.row_stride;
    }
    switch (rows) {
      case 5: return block<5, Vectors>(left, right, result, terms, add);
      case 4: return block<4, Vectors>(left, right, result, terms, add);
      case 3: return block<3, Vectors>(left, right, result, terms, add);
      case 2: return block<2, Vectors>(left, right, result, terms, add);
      case 1: return block<1, Vectors>(left, right, result, terms, add);
    }
  }

  // `n`, the columns, are whole vectors of the widest kind; the right factor has them in panels of kPanel.
  HFLOW_LEAF void run(Left left, Right right, Result result, int64_t rows, int64_t n, int64_t terms, int64_t at_once,
                      bool add) {
    for (int64_t k = 0; k < terms; k += at_once) {
      const Left part{left.data + k * left.k_stride, left.row_stride, left.k_stride};
      const int64_t count = std::min(at_once, terms - k);
      for (int64_t c = 0; c < n; c += kVectors * L::kWidth) {
        const float* panel = right.data + c / kPanel * right.panel_stride + c % kPanel + k * right.k_stride;
        const Right some{panel, right.k_stride, 0};
        const Result to{result.data + c, result.row_stride};
        switch (std::min<int64_t>(kVectors, (n - c) / L::kWidth)) {
          case 1: columns<1>(part, some, to, rows, count, add || k > 0); break;
          case 2: columns<2>(part, some, to, rows, count, add || k > 0); break;
          case 3: columns<(kVectors > 3 ? 3 : 1)>(part, some, to, rows, count, add || k > 0); break;
          default: columns<kVectors>(part, some, to, rows, count, add || k > 0);
        }
      }
    }
  }
};

}  // namespace hflow
