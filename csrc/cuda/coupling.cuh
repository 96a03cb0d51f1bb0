// coupling on CUDA: an elementwise affine transform by a network's raw output, its inverse and backward. Torch-free:
// raw pointers and a stream.
//
// Bound by memory. Forward reads x and the active elements' two raw values and writes y; backward reads x, raw and
// grad_y and writes grad_x and grad_raw. Passive elements are copied: their raw values are not read.
//   A thread's turn is one vector of 16 bytes of x, or several elements (coupling_turn.cuh). Options of a coupling are
//   branches per turn, the same for a whole grid; so kernels differ only in their types and in the vector.
//   Lanes of a warp share a small sample, a block works on one chunk of a large one; the log-det is summed in the same
//   pass. Where one block covers a sample that is all; else the chunks' sums go through a second small kernel, in order.
//   Chunks depend on the shape alone, so results have the same bits from run to run and from GPU to GPU.
#pragma once

#include "cuda/coupling_math.cuh"
#include "cuda/coupling_turn.cuh"
#include "cuda/partial_sums.cuh"

namespace hflow::cuda {

// y, and the log-det; block by block into partial[sample][chunk] where that is not null.
template <class Grid>
__global__ void __launch_bounds__(kThreads, Grid::blocks_per_sm)
    coupling_forward_kernel(const typename Grid::X* x, const typename Grid::Raw* raw, typename Grid::X* y,
                            typename Grid::T* log_det, double* partial, const __grid_constant__ Grid grid,
                            CouplingMath<typename Grid::T> math) {
  using S = typename Grid::X;
  using R = typename Grid::Raw;
  using T = typename Grid::T;
  constexpr int N = Grid::elements;
  const typename Grid::Share share = grid.share();
  x += share.sample * grid.memory.sample, y += share.sample * grid.memory.sample;
  raw += share.sample * grid.memory.raw_sample;

  double sum = 0;
  for (int64_t from = share.begin; from < share.end; from += grid.turn()) {
    const CouplingTurn<Grid> turn(grid, share, from);
    S values[N];
    R scales[N], shifts[N];
    turn.load(x, values);
    turn.load_raw(raw, scales, shifts);
    T u[N] = {};
    if (turn.any_active()) {
      T s[N], t[N], log_scale[N], turn_sum = 0;
      turn.to_computed(values, u), turn.to_computed(scales, s), turn.to_computed(shifts, t);
      math.forward(u, s, t, u, log_scale);
#pragma unroll
      for (int i = 0; i < N; ++i) turn_sum += turn.active(i) ? log_scale[i] : T(0);
      sum += static_cast<double>(turn_sum);
    }
    turn.store(u, values, y);
  }

  if (grid.blocks.lanes == kThreads) {
    sum = block_sum(sum);
  } else {
    for (int offset = grid.blocks.lanes / 2; offset > 0; offset /= 2)
      sum += __shfl_down_sync(kWholeWarp, sum, offset, grid.blocks.lanes);
  }
  if (share.lane != 0) return;
  if (partial != nullptr) {
    partial[blockIdx.x] = sum;
  } else if (share.starts_sample) {
    log_det[share.sample] = static_cast<T>(sum);
  }
}

// grad_x, and grad_raw with zeros where raw is ignored.
template <class Grid>
__global__ void __launch_bounds__(kThreads, Grid::blocks_per_sm)
    coupling_backward_kernel(const typename Grid::X* x, const typename Grid::Raw* raw, const typename Grid::X* grad_y,
                             const typename Grid::T* grad_log_det, typename Grid::X* grad_x,
                             typename Grid::Raw* grad_raw, const __grid_constant__ Grid grid,
                             CouplingMath<typename Grid::T> math) {
  using S = typename Grid::X;
  using R = typename Grid::Raw;
  using T = typename Grid::T;
  constexpr int N = Grid::elements;
  const typename Grid::Share share = grid.share();
  if (share.begin >= share.end) return;
  x += share.sample * grid.memory.sample, raw += share.sample * grid.memory.raw_sample;
  grad_y += share.sample * grid.memory.sample, grad_x += share.sample * grid.memory.sample;
  grad_raw += share.sample * grid.memory.raw_sample;
  T gradients[N];
#pragma unroll
  for (int i = 0; i < N; ++i) gradients[i] = grad_log_det[share.sample];

  for (int64_t from = share.begin; from < share.end; from += grid.turn()) {
    const CouplingTurn<Grid> turn(grid, share, from);
    S values[N], grads[N];
    R scales[N], shifts[N];
    turn.load(grad_y, grads);
    turn.load_active(x, values);
    turn.load_raw(raw, scales, shifts);
    T g[N] = {}, grad_s[N] = {}, grad_t[N] = {};
    if (turn.any_active()) {
      T u[N], s[N], t[N], y[N];
      turn.to_computed(values, u), turn.to_computed(scales, s), turn.to_computed(shifts, t);
      turn.to_computed(grads, g);
      math.backward(u, s, t, g, gradients, y, g, grad_s, grad_t);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      scales[i] = to_memory<R>(turn.active(i) ? grad_s[i] : T(0));
      shifts[i] = to_memory<R>(turn.active(i) ? grad_t[i] : T(0));
    }
    turn.store(g, grads, grad_x);
    turn.store_raw(scales, shifts, grad_raw);
  }
}

// ---- Launches ----

// f(grid) with the widest vectors that memory allows.
template <class S, class R, class F>
cudaError_t with_coupling_grid(const CouplingMemory& memory, bool is_aligned, const F& f) {
  constexpr int V = kVector<S>;
  return is_aligned && memory.fits(V) ? f(CouplingGrid<V, S, R>(memory)) : f(CouplingGrid<1, S, R>(memory));
}

// How many doubles coupling_forward needs in `partial`.
template <class S>
int64_t coupling_partial_size(const CouplingMemory& memory) {
  const CouplingBlocks blocks(memory.samples, memory.sample, kVector<S>);
  return memory.geometry.scales && blocks.chunks > 1 ? memory.samples * blocks.chunks : 0;
}

// S is the type of x and y, R that of raw, T (float or double) that of the log-det. x, raw and y are dense in one
// format.
template <class S, class R, class T>
cudaError_t coupling_forward(const S* x, const R* raw, S* y, T* log_det, double* partial, const CouplingMemory& memory,
                             const CouplingOptions& options, cudaStream_t stream) {
  if (memory.samples == 0) return cudaSuccess;
  const bool in_parts = coupling_partial_size<S>(memory) > 0;
  return with_coupling_grid<S, R>(memory, aligned(x) && aligned(raw) && aligned(y), [&](auto grid) {
    using Grid = decltype(grid);
    const cudaError_t error = launch(coupling_forward_kernel<Grid>, grid.blocks.blocks(memory.samples), stream, x, raw,
                                     y, log_det, in_parts ? partial : nullptr, grid, CouplingMath<T>(options));
    if (error != cudaSuccess || !in_parts) return error;
    return add_partial_sums(partial, memory.samples, grid.blocks.chunks, log_det, stream);
  });
}

template <class S, class R, class T>
cudaError_t coupling_backward(const S* x, const R* raw, const S* grad_y, const T* grad_log_det, S* grad_x, R* grad_raw,
                              const CouplingMemory& memory, const CouplingOptions& options, cudaStream_t stream) {
  if (memory.samples == 0 || memory.sample == 0) return cudaSuccess;
  const bool is_aligned = aligned(x) && aligned(raw) && aligned(grad_y) && aligned(grad_x) && aligned(grad_raw);
  return with_coupling_grid<S, R>(memory, is_aligned, [&](auto grid) {
    return launch(coupling_backward_kernel<decltype(grid)>, grid.blocks.blocks(memory.samples), stream, x, raw, grad_y,
                  grad_log_det, grad_x, grad_raw, grid, CouplingMath<T>(options));
  });
}

}  // namespace hflow::cuda
