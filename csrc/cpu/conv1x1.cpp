// conv1x1 on the CPU: y = W x + b per pixel, up to 32 channels, and its backward. (Python sends more to matmul.)
//
// Threads: fixed groups of consecutive tiles, of about 4 Ki elements each. Bytes: one read and one write of x forward;
// two reads and one write backward. A tile is channels × pixels; in L1, every output row is a sum of weighted input
// rows, which vectorises over pixels for any number of channels. Channels_last tiles are transposed into that shape and
// back.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/channel_mix.h"

namespace hflow {
namespace {

constexpr int64_t kTileElements = 4096;  // a tile's input and output stay in L1

template <class T>
void forward(const Tiling& tiling, Memory x, const T* weight, const T* bias, Memory y) {
  tiling.for_groups([&](int64_t group) {
    alignas(64) T in_buffer[kTileElements], out_buffer[kTileElements];
    tiling.for_tiles(group, [&](int64_t offset, int64_t n) {
      const Tile<T> in = Tile<T>::load(tiling, x, offset, n, in_buffer);
      const Tile<T> out(tiling, y, offset, out_buffer);
      const T* in_rows = in.rows;
      mix<T>(in_rows, in.stride, out.rows, out.stride, n, tiling.channels, weight, bias);
      out.store(tiling, y, offset, n, out_buffer);
    });
  });
}

// Writes grad_x; returns grad_weight followed by grad_bias.
template <class T>
std::vector<double> backward(const Tiling& tiling, Memory x, Memory grad_y, const T* transposed, Memory grad_x) {
  const std::vector<T> zeros(tiling.channels);
  GroupSums<T> sums(tiling);
  tiling.for_groups([&](int64_t group) {
    alignas(64) T x_buffer[kTileElements], grad_buffer[kTileElements], out_buffer[kTileElements];
    std::vector<T> lanes = sums.lanes();
    tiling.for_tiles(group, [&](int64_t offset, int64_t n) {
      const Tile<T> in = Tile<T>::load(tiling, x, offset, n, x_buffer);
      const Tile<T> grad = Tile<T>::load(tiling, grad_y, offset, n, grad_buffer);
      const Tile<T> out(tiling, grad_x, offset, out_buffer);
      const T *grad_rows = grad.rows, *in_rows = in.rows;
      mix<T>(grad_rows, grad.stride, out.rows, out.stride, n, tiling.channels, transposed, zeros.data());
      out.store(tiling, grad_x, offset, n, out_buffer);
      add_outer_product<T>(grad_rows, grad.stride, in_rows, in.stride, n, tiling.channels, lanes.data());
    });
    sums.fold(group, lanes);
  });
  return sums.total();
}

Tensor conv1x1_fwd(Tensor x, Tensor weight, Tensor bias) {
  check_mix("conv1x1", x, weight, bias);
  const MemoryFormat format = format_of(x);
  x = as_format(x, format);
  weight = as_format(weight, MemoryFormat::Contiguous), bias = as_format(bias, MemoryFormat::Contiguous);
  Tensor y = empty_in(x, format);
  if (x.numel() == 0) return y;
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    std::vector<T> bias_values(x.size(1));
    gather(Memory::of(bias), 0, bias_values.data(), {1, x.size(1), 0, 1, 0});
    forward<T>(Tiling(x, format, kTileElements, true), Memory::of(x), matrix_of<T>(weight, false).data(),
               bias_values.data(), Memory::of(y));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv1x1_bwd(Tensor x, Tensor weight, Tensor bias, Tensor grad_y) {
  check_mix("conv1x1", x, weight, bias);
  check_floating("conv1x1", "grad_y", grad_y);
  check_like("conv1x1", "grad_y", grad_y, x, x.size(1));
  const MemoryFormat format = format_of(x);
  x = as_format(x, format), grad_y = as_format(grad_y, format), weight = as_format(weight, MemoryFormat::Contiguous);
  Tensor grad_x = empty_in(x, format);
  Tensor grad_weight = empty_in(weight, MemoryFormat::Contiguous), grad_bias = empty_in(bias, MemoryFormat::Contiguous);
  const int64_t channels = x.size(1);
  std::vector<double> sums(channels * channels + channels);
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if (x.numel() == 0) return;
    sums = backward<T>(Tiling(x, format, kTileElements, true), Memory::of(x), Memory::of(grad_y),
                       matrix_of<T>(weight, true).data(), Memory::of(grad_x));
  });
  scatter(sums.data(), Memory::of(grad_weight), 0, {1, channels * channels, 0, 1, 0});
  scatter(sums.data() + channels * channels, Memory::of(grad_bias), 0, {1, channels, 0, 1, 0});
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("conv1x1_fwd", TORCH_BOX(&hflow::conv1x1_fwd));
  m.impl("conv1x1_bwd", TORCH_BOX(&hflow::conv1x1_bwd));
}
