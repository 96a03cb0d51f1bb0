// lu on the CPU: log|det W| and W⁻¹ of many small matrices by one LU factorisation each, in float64 whatever the input.
//
// Threads: matrices. Bytes: one read and one write of every matrix; the work is 8/3·n³ flops per matrix, in L1 for the
// sizes that flows use. All inner loops run along rows, so they vectorise.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace hflow {
namespace {

// Turns a (n × n, by rows) into its LU factors and `inverse` into a⁻¹; returns log|det a|.
struct FactorAndInvert {
  HFLOW_LEAF void subtract_row(double* __restrict row, const double* __restrict other, double factor, int64_t begin,
                               int64_t n) {
    for (int64_t j = begin; j < n; ++j) row[j] -= factor * other[j];
  }

  HFLOW_LEAF void swap_rows(double* __restrict a, double* __restrict b, int64_t n) {
    for (int64_t j = 0; j < n; ++j) std::swap(a[j], b[j]);
  }

  // The row of the largest |a[i][k]|, i ≥ k. NaN counts as largest, so that it reaches the result.
  HFLOW_LEAF int64_t pivot_row(const double* a, int64_t k, int64_t n) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (!(std::fabs(a[i * n + k]) <= std::fabs(a[pivot * n + k]))) pivot = i;
    return pivot;
  }

  HFLOW_LEAF void run(double* a, double* inverse, int64_t n, double* log_abs_det) {
    for (int64_t i = 0; i < n * n; ++i) inverse[i] = i % (n + 1) == 0 ? 1.0 : 0.0;
    double log_sum = 0;
    // Elimination, and forward substitution on the identity alongside.
    for (int64_t k = 0; k < n; ++k) {
      const int64_t pivot = pivot_row(a, k, n);
      if (pivot != k) {
        swap_rows(a + k * n, a + pivot * n, n);
        swap_rows(inverse + k * n, inverse + pivot * n, n);
      }
      const double diagonal = a[k * n + k];
      log_sum += std::log(std::fabs(diagonal));
      if (diagonal == 0) continue;  // the whole column is zero: nothing to eliminate
      for (int64_t i = k + 1; i < n; ++i) {
        const double factor = a[i * n + k] / diagonal;
        subtract_row(a + i * n, a + k * n, factor, k + 1, n);
        subtract_row(inverse + i * n, inverse + k * n, factor, 0, n);
      }
    }
    *log_abs_det = log_sum;
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t k = i + 1; k < n; ++k) subtract_row(inverse + i * n, inverse + k * n, a[i * n + k], 0, n);
      for (int64_t j = 0; j < n; ++j) inverse[i * n + j] /= a[i * n + i];
    }
  }
};

std::tuple<Tensor, Tensor> lu_fwd(Tensor weight) {
  check_floating("lu", "weight", weight);
  const int64_t dim = weight.dim();
  if ((dim != 2 && dim != 3) || weight.size(dim - 1) != weight.size(dim - 2))
    fail("lu", "weight must have shape (C, C) or (N, C, C), got ", shape_of(weight));
  weight = as_format(weight, MemoryFormat::Contiguous);
  const ScalarType type = compute_type(weight.scalar_type());
  const int64_t n = weight.size(dim - 1), matrices = dim == 3 ? weight.size(0) : 1;
  Tensor log_abs_det = dim == 3 ? empty(weight, {matrices}, type) : empty(weight, {}, type);
  Tensor inverse = dim == 3 ? empty(weight, {matrices, n, n}, type) : empty(weight, {n, n}, type);
  const Memory in = Memory::of(weight), log_out = Memory::of(log_abs_det), inverse_out = Memory::of(inverse);
  parallel_units(matrices, n * n * n, [&](int64_t m) {
    const std::unique_ptr<double[]> factors(new double[n * n]), result(new double[n * n]);
    double log_sum;
    const Runs all{1, n * n, 0, 1, 0};
    gather(in, m * n * n, factors.get(), all);
    run_leaf<FactorAndInvert>(factors.get(), result.get(), n, &log_sum);
    if (log_sum == -std::numeric_limits<double>::infinity()) std::fill_n(result.get(), n * n, std::nan(""));
    scatter(result.get(), inverse_out, m * n * n, all);
    scatter(&log_sum, log_out, m, {1, 1, 0, 1, 0});
  });
  return {log_abs_det, inverse};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) { m.impl("lu_fwd", TORCH_BOX(&hflow::lu_fwd)); }
