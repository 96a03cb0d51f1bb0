// resample on CUDA: the binomial filter [1, 3, 3, 1], ×2 down or up along both axes, and its adjoint. Torch-free.
//
// Bound by memory: one read and one write, in 16-byte accesses; the rows that several results share come from the caches.
// A thread makes one row segment of results out of the rows above and below it:
//   contiguous      V pixels of the smaller side side by side: one vector if halved from two, two if doubled from one,
//                   with the pixel before and after them read alone.
//   channels_last   V channels of one pixel of the smaller side; its neighbours are vectors, too.
// Polyphase: no zeros are multiplied. Where rows or channels are no multiple of V, or memory is not aligned, V = 1.
#pragma once

#include "cuda/device.cuh"
#include "network_formulas.h"

namespace hflow::cuda {

// On the smaller side an image has height × width pixels, `lanes` channels wide: planes of one, or whole samples.
struct ResampleShape {
  int64_t images, height, width, lanes;
  bool up, adjoint;

  __host__ __device__ bool doubles() const { return up != adjoint; }
  __host__ __device__ int64_t larger() const { return images * 2 * height * 2 * width * lanes; }
};

template <int V, bool Lanes, bool Doubles>
struct ResampleGrid {
  static constexpr int vector = V;
  static constexpr int lanes = Lanes ? V : 1;         // of a pixel that a thread works on
  static constexpr int pixels = V / lanes;            // of the smaller side
  static constexpr int in_vectors = Doubles ? 1 : 2;  // per row
  static constexpr int out_vectors = Doubles ? 2 : 1;
  ResampleShape shape;

  __host__ __device__ int64_t in_width() const { return in_vectors * shape.width; }
  __host__ __device__ int64_t in_height() const { return in_vectors * shape.height; }
  __host__ __device__ int64_t out_width() const { return out_vectors * shape.width; }
  __host__ __device__ int64_t out_height() const { return out_vectors * shape.height; }
  // Of the forward direction's input, n being an axis of the smaller side.
  __host__ __device__ ResampleEdges edges(int64_t n) const { return ResampleEdges(shape.up, shape.up ? n : 2 * n); }
  __host__ __device__ int64_t threads() const {
    return shape.images * out_height() * (shape.width / pixels) * (shape.lanes / lanes);
  }

  // Elements between a thread's vectors of one row: contiguous they follow each other.
  __device__ int64_t step() const { return Lanes ? shape.lanes : V; }
};

template <class Grid, bool Doubles, class S, class T>
class RowSegment {
 public:
  static constexpr int L = Grid::lanes, in = Grid::in_vectors * Grid::vector, out = Grid::out_vectors * Grid::vector;

  // `first` is the first pixel of the smaller side, `lane` the first channel.
  __device__ RowSegment(const Grid& grid, int64_t first, int64_t lane)
      : grid_(grid), first_(first), lane_(lane), edges_(grid.edges(grid.shape.width)),
        weight_(resample_weight<T>(grid.shape.up)) {}

  // results += row_weight · the filter along the row x.
  __device__ void add(const S* x, T row_weight, T (&results)[out]) const {
    constexpr int V = Grid::vector;
    const int64_t n = grid_.in_width(), begin = first_ * Grid::in_vectors, end = begin + in / L;
    T values[in], before[L], after[L];
#pragma unroll
    for (int k = 0; k < Grid::in_vectors; ++k) {
      T part[V];
      load(x + begin * grid_.shape.lanes + lane_ + k * grid_.step(), 0, V, part);
#pragma unroll
      for (int i = 0; i < V; ++i) values[k * V + i] = part[i];
    }
    pixel(x, begin > 0 ? begin - 1 : edges_.before, begin > 0, before);
    pixel(x, end < n ? end : edges_.after, end < n, after);
#pragma unroll
    for (int p = 0; p < Grid::pixels; ++p) {
#pragma unroll
      for (int l = 0; l < L; ++l) {
        if constexpr (Doubles) {
          const T near = values[p * L + l];
          const T left = p == 0 ? before[l] : values[max(p - 1, 0) * L + l];
          const T right = p + 1 == Grid::pixels ? after[l] : values[min(p + 1, Grid::pixels - 1) * L + l];
          results[2 * p * L + l] += row_weight * doubled(near, left, weight_);
          results[(2 * p + 1) * L + l] += row_weight * doubled(near, right, weight_);
        } else {
          const T left = p == 0 ? before[l] : values[max(2 * p - 1, 0) * L + l];
          const T right = p + 1 == Grid::pixels ? after[l] : values[min(2 * p + 2, 2 * Grid::pixels - 1) * L + l];
          results[p * L + l] += row_weight * halve(left, values[2 * p * L + l], values[(2 * p + 1) * L + l], right,
                                                   weight_);
        }
      }
    }
    if (grid_.shape.adjoint) {
      fold(x, 0, edges_.before, row_weight, results);
      fold(x, n - 1, edges_.after, row_weight, results);
    }
  }

 private:
  // The pixel at `index`, or zeros where the adjoint has none.
  __device__ void pixel(const S* x, int64_t index, bool inside, T (&values)[L]) const {
    if (inside || !grid_.shape.adjoint) {
      load(x + index * grid_.shape.lanes + lane_, 0, L, values);
    } else {
#pragma unroll
      for (int l = 0; l < L; ++l) values[l] = T(0);
    }
  }

  // What the adjoint would write beyond an edge next to the pixel `source` is added to the result at `place`.
  __device__ void fold(const S* x, int64_t source, int64_t place, T row_weight, T (&results)[out]) const {
    const int64_t begin = first_ * Grid::out_vectors;
    if (place < begin || place >= begin + out / L) return;
    T values[L];
    pixel(x, source, true, values);
#pragma unroll
    for (int p = 0; p < out / L; ++p)
#pragma unroll
      for (int l = 0; l < L; ++l) results[p * L + l] += begin + p == place ? row_weight * weight_ * values[l] : T(0);
  }

  Grid grid_;
  int64_t first_, lane_;
  ResampleEdges edges_;
  T weight_;
};

template <class Grid, bool Doubles, class S, class T>
__global__ void __launch_bounds__(kThreads) resample_kernel(const S* x, S* y, Grid grid) {
  constexpr int V = Grid::vector;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= grid.threads()) return;
  const ResampleShape& shape = grid.shape;
  const int64_t lane_groups = shape.lanes / Grid::lanes, segments = shape.width / Grid::pixels;
  const int64_t lane = thread % lane_groups * Grid::lanes, first = thread / lane_groups % segments * Grid::pixels;
  const int64_t line = thread / lane_groups / segments;  // of all results
  const int64_t image = line / grid.out_height(), o = line % grid.out_height();
  const S* in = x + image * grid.in_height() * grid.in_width() * shape.lanes;

  const RowSegment<Grid, Doubles, S, T> segment(grid, first, lane);
  const ResampleEdges edges = grid.edges(shape.height);
  const int64_t n = grid.in_height();
  const T weight = resample_weight<T>(shape.up);
  T results[RowSegment<Grid, Doubles, S, T>::out] = {};
  const auto add = [&](int64_t row, T row_weight) {
    if (row < 0 || row >= n) {
      if (shape.adjoint) return;
      row = row < 0 ? edges.before : edges.after;
    }
    segment.add(in + row * grid.in_width() * shape.lanes, row_weight, results);
  };
  if constexpr (Doubles) {
    add(o / 2, T(3) * weight);
    add(o % 2 == 0 ? o / 2 - 1 : o / 2 + 1, weight);
  } else {
    add(2 * o - 1, weight);
    add(2 * o, T(3) * weight);
    add(2 * o + 1, T(3) * weight);
    add(2 * o + 2, weight);
  }
  if (shape.adjoint && o == edges.before) add(0, weight);
  if (shape.adjoint && o == edges.after) add(n - 1, weight);

  S* out = y + (line * grid.out_width() + first * Grid::out_vectors) * shape.lanes + lane;
#pragma unroll
  for (int k = 0; k < Grid::out_vectors; ++k) {
    T part[V];
#pragma unroll
    for (int i = 0; i < V; ++i) part[i] = results[k * V + i];
    store(part, 0, V, out + k * grid.step());
  }
}

// ---- Launches ----

template <int V, bool Lanes, bool Doubles, class S, class T>
cudaError_t resample_in_vectors(const S* x, S* y, const ResampleShape& shape, cudaStream_t stream) {
  const ResampleGrid<V, Lanes, Doubles> grid{shape};
  return launch(resample_kernel<ResampleGrid<V, Lanes, Doubles>, Doubles, S, T>, ceil_div(grid.threads(), kThreads),
                stream, x, y, grid);
}

// S is the type of x and y, T, float or double, that of the sums. x and y are dense in one format.
template <class S, class T>
cudaError_t resample(const S* x, S* y, const ResampleShape& shape, cudaStream_t stream) {
  constexpr int V = kVector<S>;
  if (shape.larger() == 0) return cudaSuccess;
  const auto run = [&](auto doubles) {
    constexpr bool D = decltype(doubles)::value;
    const bool is_aligned = aligned(x) && aligned(y);
    if (is_aligned && shape.lanes == 1 && shape.width % V == 0)
      return resample_in_vectors<V, false, D, S, T>(x, y, shape, stream);
    if (is_aligned && shape.lanes % V == 0) return resample_in_vectors<V, true, D, S, T>(x, y, shape, stream);
    return resample_in_vectors<1, true, D, S, T>(x, y, shape, stream);
  };
  return shape.doubles() ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace hflow::cuda
