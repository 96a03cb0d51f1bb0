// lu on the CPU: log|det W| and W⁻¹ of many small matrices by one LU factorisation each, in float64 whatever the input.
//
// Threads: matrices, of all stacks together. Bytes: one read and one write of every matrix; the work is 8/3·n³ flops
// per matrix, in L1 for the sizes that flows use. All inner loops run along rows, so they vectorise.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"
#include "formulas.h"

namespace hflow {
namespace {

// Turns a (n × n, by rows) into its LU factors and `inverse` into a⁻¹; returns log|det a|. Both are NaN where some of a
// is not finite; where a is singular they are NaN and −∞. `rows` and `columns` are scratch of n each.
struct FactorAndInvert {
  // The sums of |a| along rows, and along columns once every row is divided by its sum: scaling a row or a column of a
  // scales them with it, so that it never makes a matrix count as singular.
  HFLOW_LEAF void measure(const double* a, int64_t n, double* __restrict rows, double* __restrict columns) {
    for (int64_t j = 0; j < n; ++j) columns[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) sum += std::fabs(a[i * n + j]);
      rows[i] = sum;
      const double scale = 1 / sum;
      for (int64_t j = 0; j < n; ++j) columns[j] += std::fabs(a[i * n + j]) * scale;
    }
  }

  HFLOW_LEAF void subtract_row(double* __restrict row, const double* __restrict other, double factor, int64_t begin,
                               int64_t n) {
    for (int64_t j = begin; j < n; ++j) row[j] -= factor * other[j];
  }

  HFLOW_LEAF void swap_rows(double* __restrict a, double* __restrict b, int64_t n) {
    for (int64_t j = 0; j < n; ++j) std::swap(a[j], b[j]);
  }

  // The row of the largest |a[i][k]|, i ≥ k.
  HFLOW_LEAF int64_t pivot_row(const double* a, int64_t k, int64_t n) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::fabs(a[i * n + k]) > std::fabs(a[pivot * n + k])) pivot = i;
    return pivot;
  }

  HFLOW_LEAF void run(double* a, double* inverse, double* rows, double* columns, int64_t n, double* log_abs_det) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    measure(a, n, rows, columns);
    for (int64_t i = 0; i < n; ++i) {
      if (!(rows[i] < inf)) return undefined(inverse, n, std::nan(""), log_abs_det);
    }
    for (int64_t i = 0; i < n * n; ++i) inverse[i] = i % (n + 1) == 0 ? 1.0 : 0.0;
    double log_sum = 0;
    // Elimination, and forward substitution on the identity alongside.
    for (int64_t k = 0; k < n; ++k) {
      const int64_t pivot = pivot_row(a, k, n);
      if (pivot != k) {
        swap_rows(a + k * n, a + pivot * n, n);
        swap_rows(inverse + k * n, inverse + pivot * n, n);
        std::swap(rows[k], rows[pivot]);
      }
      const double diagonal = a[k * n + k];
      const bool regular = std::fabs(diagonal) > kSingularPivot * rows[k] * columns[k];
      if (!regular) return undefined(inverse, n, -inf, log_abs_det);
      log_sum += std::log(std::fabs(diagonal));
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

 private:
  HFLOW_LEAF void undefined(double* inverse, int64_t n, double log_det, double* log_abs_det) {
    for (int64_t i = 0; i < n * n; ++i) inverse[i] = std::nan("");
    *log_abs_det = log_det;
  }
};

// Matrices of one size, and where their results go.
struct Stack {
  Memory in, log_out, inverse_out;
  int64_t matrices, n;

  void factor(int64_t m) const {
    const std::unique_ptr<double[]> buffer(new double[2 * n * (n + 1)]);
    double *factors = buffer.get(), *inverse = factors + n * n, *rows = inverse + n * n, log_sum;
    const Runs all{1, n * n, 0, 1, 0};
    gather(in, m * n * n, factors, all);
    run_leaf<FactorAndInvert>(factors, inverse, rows, rows + n, n, &log_sum);
    scatter(inverse, inverse_out, m * n * n, all);
    scatter(&log_sum, log_out, m, {1, 1, 0, 1, 0});
  }
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>> factor_stacks(const char* op, std::vector<Tensor> weights) {
  std::vector<Tensor> log_abs_dets, inverses;
  std::vector<Stack> stacks;
  int64_t matrices = 0, cost = 1;
  for (Tensor& weight : weights) {
    check_matrices(op, weight);
    weight = as_format(weight, MemoryFormat::Contiguous);
    const ScalarType type = compute_type(weight.scalar_type());
    const int64_t dim = weight.dim(), n = weight.size(dim - 1), count = dim == 3 ? weight.size(0) : 1;
    log_abs_dets.push_back(dim == 3 ? empty(weight, {count}, type) : empty(weight, {}, type));
    inverses.push_back(dim == 3 ? empty(weight, {count, n, n}, type) : empty(weight, {n, n}, type));
    stacks.push_back({Memory::of(weight), Memory::of(log_abs_dets.back()), Memory::of(inverses.back()), count, n});
    matrices += count;
    cost = std::max(cost, n * n * n);
  }
  parallel_units(matrices, cost, [&](int64_t m) {
    auto stack = stacks.begin();
    for (; m >= stack->matrices; ++stack) m -= stack->matrices;
    stack->factor(m);
  });
  return {log_abs_dets, inverses};
}

std::tuple<Tensor, Tensor> lu_fwd(Tensor weight) {
  const auto [log_abs_dets, inverses] = factor_stacks("lu", {weight});
  return {log_abs_dets[0], inverses[0]};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> lu_many_fwd(std::vector<Tensor> weights) {
  return factor_stacks("lu_many", weights);
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("lu_fwd", TORCH_BOX(&hflow::lu_fwd));
  m.impl("lu_many_fwd", TORCH_BOX(&hflow::lu_many_fwd));
}
