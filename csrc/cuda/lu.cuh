// lu on CUDA: log|det W| and W⁻¹ of many small matrices, of stacks of different sizes and dtypes, in one launch, in
// float64 whatever the input. Torch-free: raw pointers and a stream.
//
// In-place Gauss–Jordan with partial pivoting. Step k exchanges y_p and x_k in y = A x, p being the pivot's row, so no
// rows are swapped: in the end that row holds row k of the inverse, its column j belonging to the row p of step j.
//   up to 8 × 8   Eight lanes per matrix, a row of it in the registers of each; rows travel by shuffles. Four matrices
//                 per warp: what counts is the latency of a step, about one division and two rounds of shuffles.
//   up to 64 × 64  A block per matrix, which lies in shared memory; warps own rows, lanes columns, so that an update
//                 touches its own elements only.
// Bytes: one read and one write of every matrix, far from any limit. Bits do not depend on the launch.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/device.cuh"
#include "formulas.h"

namespace hflow::cuda {

constexpr int kLuThreads = 128;
constexpr int kLuRegisterSize = 8, kLuSharedSize = 64;  // the largest matrices of each kind
constexpr int kLuStacks = 16;                           // of one launch: the table travels in the kernel's parameters
constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

enum class LuType : int { float32, float64, bfloat16, float16 };

// Matrices (count, n, n) in `type`; results in float64 for float64 and in float32 for the others.
struct LuStack {
  const void* weight;
  void* log_abs_det;
  void* inverse;
  int64_t count;
  int n;
  LuType type;

  bool in_registers() const { return n <= kLuRegisterSize; }
  int64_t blocks() const { return in_registers() ? ceil_div(count, kLuThreads / kLuRegisterSize) : count; }
};

struct LuTable {
  LuStack stacks[kLuStacks];
  int64_t first_blocks[kLuStacks];
  int size;
};

// f(weight), with the pointer's type; once per thread and not per element, so that a thread's loads overlap.
template <class F>
__device__ void with_weight(const LuStack& stack, const F& f) {
  switch (stack.type) {
    case LuType::float64: return f(static_cast<const double*>(stack.weight));
    case LuType::bfloat16: return f(static_cast<const __nv_bfloat16*>(stack.weight));
    case LuType::float16: return f(static_cast<const __half*>(stack.weight));
    default: return f(static_cast<const float*>(stack.weight));
  }
}

// f(log_abs_det, inverse), likewise.
template <class F>
__device__ void with_results(const LuStack& stack, const F& f) {
  if (stack.type == LuType::float64) {
    f(static_cast<double*>(stack.log_abs_det), static_cast<double*>(stack.inverse));
  } else {
    f(static_cast<float*>(stack.log_abs_det), static_cast<float*>(stack.inverse));
  }
}

// What cannot be inverted gives NaN, and −∞ or NaN as log|det|.
struct LuOutcome {
  bool finite, regular;

  __device__ double log_abs_det(double sum) const {
    return !finite ? kNaN : regular ? sum : -kInfinity;
  }
  __device__ double inverse(double value) const {
    return finite && regular ? value : kNaN;
  }
};

// ---- Eight lanes per matrix ----

template <class T>
__device__ T row_group_sum(T value) {
#pragma unroll
  for (int bit = 1; bit < kLuRegisterSize; bit *= 2) value += __shfl_xor_sync(kWholeWarp, value, bit);
  return value;
}

__device__ inline bool row_group_all(bool condition) {
  const unsigned failures = __ballot_sync(kWholeWarp, !condition);
  const int first = static_cast<int>(threadIdx.x) % 32 / kLuRegisterSize * kLuRegisterSize;
  return (failures >> first & ((1u << kLuRegisterSize) - 1)) == 0;
}

// The row of the largest |value| among those not `used`, to 2⁻¹⁶ of its size: its leading bits and the row in one word.
__device__ inline int row_group_pivot(double value, bool used, int row) {
  const double magnitude = fabs(value);
  uint64_t bits;
  memcpy(&bits, &magnitude, sizeof(bits));
  constexpr unsigned unused = kLuRegisterSize;  // a bit above the row's: even zeros go before used rows
  unsigned key = used ? 0 : (static_cast<unsigned>(bits >> 32) & ~(2 * unused - 1)) | unused | (unused - 1 - row);
#pragma unroll
  for (int bit = 1; bit < kLuRegisterSize; bit *= 2) key = max(key, __shfl_xor_sync(kWholeWarp, key, bit));
  return static_cast<int>(unused - 1 - (key & (unused - 1)));
}

__device__ inline void lu_in_registers(const LuStack& stack, int64_t block) {
  constexpr int size = kLuRegisterSize;
  const int row = static_cast<int>(threadIdx.x) % size, n = stack.n;
  const int64_t matrix = block * (kLuThreads / size) + threadIdx.x / size, begin = matrix * n * n;
  const bool exists = matrix < stack.count;
  // What is missing to 8 × 8, and matrices beyond the last, are the identity's.
  double a[size];
  with_weight(stack, [&](const auto* weight) {
#pragma unroll
    for (int j = 0; j < size; ++j)
      a[j] = exists && row < n && j < n ? to_compute<double>(weight[begin + row * n + j]) : row == j ? 1.0 : 0.0;
  });

  double row_sum = 0;
#pragma unroll
  for (int j = 0; j < size; ++j) row_sum += fabs(a[j]);
  const double row_scale = 1 / row_sum;
  float column_sums[size];  // a threshold's factor needs no more than float32
#pragma unroll
  for (int j = 0; j < size; ++j) column_sums[j] = row_group_sum(static_cast<float>(fabs(a[j]) * row_scale));

  double pivot = 1;  // of this row
  int step = 0, pivot_rows[size];
  bool used = row >= n, regular = true;
#pragma unroll
  for (int k = 0; k < size; ++k) {
    pivot_rows[k] = k;
    if (k >= n) continue;
    const double reciprocal = 1 / a[k];  // of every row, while the pivot is being found
    const int p = row_group_pivot(a[k], used, row);
    const double scale = __shfl_sync(kWholeWarp, reciprocal, p, size);
    const bool is_pivot = row == p;
    if (is_pivot) {
      used = true, step = k, pivot = a[k];
      regular = fabs(pivot) > kSingularPivot * row_sum * static_cast<double>(column_sums[k]);
    }
    const double factor = is_pivot ? scale : -a[k] * scale;
#pragma unroll
    for (int j = 0; j < size; ++j) {
      if (j == k) continue;
      const double from_pivot = __shfl_sync(kWholeWarp, a[j], p, size);
      a[j] = factor * from_pivot + (is_pivot ? 0.0 : a[j]);
    }
    a[k] = factor;
    pivot_rows[k] = p;
  }

  const double log_sum = row_group_sum(log(fabs(pivot)));
  const LuOutcome outcome{row_group_all(row_sum < kInfinity), row_group_all(regular)};
  if (!exists) return;
  with_results(stack, [&](auto* log_abs_det, auto* inverse) {
    using T = std::remove_pointer_t<decltype(inverse)>;
    if (row == 0) log_abs_det[matrix] = static_cast<T>(outcome.log_abs_det(log_sum));
#pragma unroll
    for (int j = 0; j < size; ++j)
      if (row < n && j < n) inverse[begin + step * n + pivot_rows[j]] = static_cast<T>(outcome.inverse(a[j]));
  });
}

// ---- A block per matrix ----

// The row of the largest element of a column among those not used, in every lane; a lane looks at rows `lane` and
// `lane` + 32.
__device__ inline int warp_pivot(const DynamicShared<double>& matrix, int column, int stride, int n,
                                 const bool (&used)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double best = -1;
  int pivot = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = lane + 32 * h;
    if (i >= n || used[h]) continue;
    const double value = matrix[i * stride + column];
    if (fabs(value) > best) best = fabs(value), pivot = i;
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    const double other = __shfl_xor_sync(kWholeWarp, best, bit);
    const int other_pivot = __shfl_xor_sync(kWholeWarp, pivot, bit);
    if (other > best || (other == best && other_pivot < pivot)) best = other, pivot = other_pivot;
  }
  return pivot;
}

__device__ inline void lu_in_shared(const LuStack& stack, int64_t block) {
  constexpr int warps = kLuThreads / 32;
  const DynamicShared<double> matrix = dynamic_shared<double>();
  __shared__ SharedArray<double, kLuSharedSize> row_sums, row_scales, column_sums, pivots;
  __shared__ SharedArray<int, kLuSharedSize> pivot_rows;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int n = stack.n, stride = n | 1;  // odd: the elements of a column lie in different banks
  const int64_t begin = block * n * n;
  with_weight(stack, [&](const auto* weight) {
    for (int e = thread; e < n * n; e += kLuThreads)
      matrix[e / n * stride + e % n] = to_compute<double>(weight[begin + e]);
  });
  __syncthreads();
  if (thread < n) {
    double sum = 0;
    for (int j = 0; j < n; ++j) sum += fabs(static_cast<double>(matrix[thread * stride + j]));
    row_sums[thread] = sum;
    row_scales[thread] = 1 / sum;
  }
  __syncthreads();
  LuOutcome outcome{true, true};
  for (int i = 0; i < n; ++i) outcome.finite &= row_sums[i] < kInfinity;
  if (thread < n) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += fabs(static_cast<double>(matrix[i * stride + thread])) * row_scales[i];
    column_sums[thread] = sum;
  }
  bool used[2] = {};
  for (int k = 0; outcome.finite && outcome.regular && k < n; ++k) {
    __syncthreads();  // after the last update
    const int p = warp_pivot(matrix, k, stride, n, used);
#pragma unroll
    for (int h = 0; h < 2; ++h) used[h] |= p == lane + 32 * h;
    const double pivot = matrix[p * stride + k];
    outcome.regular = fabs(pivot) > kSingularPivot * row_sums[p] * column_sums[k];
    const double scale = 1 / pivot;
    double pivot_row[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      pivot_row[h] = lane + 32 * h < n ? static_cast<double>(matrix[p * stride + lane + 32 * h]) : 0;
    if (thread == 0) pivots[k] = pivot, pivot_rows[k] = p;
    __syncthreads();  // before the next update
    for (int i = warp; i < n; i += warps) {
      double row[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        row[h] = lane + 32 * h < n ? static_cast<double>(matrix[i * stride + lane + 32 * h]) : 0;
      const double in_column = __shfl_sync(kWholeWarp, k < 32 ? row[0] : row[1], k % 32);
      const double factor = i == p ? scale : -in_column * scale;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = lane + 32 * h;
        if (j < n) matrix[i * stride + j] = j == k ? factor : factor * pivot_row[h] + (i == p ? 0.0 : row[h]);
      }
    }
  }
  __syncthreads();
  const bool is_defined = outcome.finite && outcome.regular;
  double log_sum = 0;
  for (int k = lane; is_defined && k < n; k += 32) log_sum += log(fabs(static_cast<double>(pivots[k])));
  log_sum = warp_sum(log_sum);
  with_results(stack, [&](auto* log_abs_det, auto* inverse) {
    using T = std::remove_pointer_t<decltype(inverse)>;
    if (thread == 0) log_abs_det[block] = static_cast<T>(outcome.log_abs_det(log_sum));
    for (int e = thread; e < n * n; e += kLuThreads) {
      const int k = e / n, j = e % n;
      const double value = is_defined ? static_cast<double>(matrix[pivot_rows[k] * stride + j]) : 0;
      const int column = is_defined ? static_cast<int>(pivot_rows[j]) : j;
      inverse[begin + k * n + column] = static_cast<T>(outcome.inverse(value));
    }
  });
}

__global__ void __launch_bounds__(kLuThreads) lu_kernel(const __grid_constant__ LuTable table) {
  int s = 0;
  while (s + 1 < table.size && blockIdx.x >= table.first_blocks[s + 1]) ++s;
  const LuStack& stack = table.stacks[s];
  const int64_t block = blockIdx.x - table.first_blocks[s];
  if (stack.n <= kLuRegisterSize) {
    lu_in_registers(stack, block);
  } else {
    lu_in_shared(stack, block);
  }
}

// ---- Launch ----

// Stacks of matrices of up to kLuSharedSize rows, kLuStacks of them per launch.
inline cudaError_t lu_factor(const LuStack* stacks, int64_t size, cudaStream_t stream) {
  for (int64_t first = 0; first < size; first += kLuStacks) {
    LuTable table{};
    int64_t blocks = 0;
    int largest = 0;
    for (int64_t s = first; s < std::min(size, first + kLuStacks); ++s) {
      if (stacks[s].count == 0) continue;
      table.stacks[table.size] = stacks[s];
      table.first_blocks[table.size++] = blocks;
      blocks += stacks[s].blocks();
      if (!stacks[s].in_registers()) largest = std::max(largest, stacks[s].n);
    }
    if (blocks == 0) continue;
    const int shared_bytes = largest * (largest | 1) * static_cast<int>(sizeof(double));
    const cudaError_t error = launch(lu_kernel, {blocks, kLuThreads, shared_bytes}, stream, table);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace hflow::cuda
