// conv1x1 on the CPU: y = W x + b per pixel, up to 32 channels, and its backward. (Python sends more channels to matmul.)
//
// Threads: fixed groups of consecutive tiles, of about 4 Ki elements each. Bytes: one read and one write of x forward; two
// reads and one write backward. A tile is channels × pixels; in L1, every output row is a sum of weighted input rows, which
// vectorises over pixels for any number of channels. Channels_last tiles are transposed into that shape and back.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace hflow {
namespace {

constexpr int64_t kMaxChannels = 32;
constexpr int64_t kTileElements = 4096;  // a tile's input and output stay in L1
constexpr int64_t kMaxGroups = 64;       // of tiles: the units of work, and of the weight gradient's partial sums

// out = Σ_g w[g]·x[g], plus `start` or what out already holds.
template <int G, bool Start, class T>
HFLOW_LEAF void add_rows(const T* __restrict x, int64_t stride, const T* w, T start, T* __restrict out, int64_t n) {
  for (int64_t p = 0; p < n; ++p) {
    T value = Start ? start : out[p];
    for (int g = 0; g < G; ++g) value += w[g] * x[g * stride + p];
    out[p] = value;
  }
}

template <bool Start, class T>
HFLOW_LEAF int64_t add_up_to_four_rows(int64_t rows, const T* x, int64_t stride, const T* w, T start, T* out, int64_t n) {
  switch (rows) {
    case 1: add_rows<1, Start>(x, stride, w, start, out, n); return 1;
    case 2: add_rows<2, Start>(x, stride, w, start, out, n); return 2;
    case 3: add_rows<3, Start>(x, stride, w, start, out, n); return 3;
    default: add_rows<4, Start>(x, stride, w, start, out, n); return 4;
  }
}

// y = W x + b for a tile; weight and bias may be a transposed matrix and zeros (backward).
template <class T>
struct Mix {
  HFLOW_LEAF void run(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n, int64_t channels, const T* weight,
                      const T* bias) {
    for (int64_t o = 0; o < channels; ++o) {
      const T* w = weight + o * channels;
      int64_t c = add_up_to_four_rows<true>(channels, x, x_stride, w, bias[o], y + o * y_stride, n);
      while (c < channels)
        c += add_up_to_four_rows<false>(channels - c, x + c * x_stride, x_stride, w + c, T(0), y + o * y_stride, n);
    }
  }
};

// grad_weight += g xᵀ and grad_bias += Σ g over a tile. Sums keep 64 lanes, folded pairwise: vectorisable and accurate.
template <class T>
struct OuterProduct {
  HFLOW_LEAF double fold(T* lanes) {
    for (int width = 32; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    return static_cast<double>(lanes[0]);
  }

  HFLOW_LEAF double dot(const T* a, const T* b, int64_t n) {
    T lanes[64] = {};
    int64_t p = 0;
    for (; p + 64 <= n; p += 64)
      for (int j = 0; j < 64; ++j) lanes[j] += a[p + j] * b[p + j];
    for (int j = 0; p < n; ++p, ++j) lanes[j] += a[p] * b[p];
    return fold(lanes);
  }

  HFLOW_LEAF double sum(const T* a, int64_t n) {
    T lanes[64] = {};
    int64_t p = 0;
    for (; p + 64 <= n; p += 64)
      for (int j = 0; j < 64; ++j) lanes[j] += a[p + j];
    for (int j = 0; p < n; ++p, ++j) lanes[j] += a[p];
    return fold(lanes);
  }

  HFLOW_LEAF void run(const T* g, int64_t g_stride, const T* x, int64_t x_stride, int64_t n, int64_t channels,
                      double* grad_weight, double* grad_bias) {
    for (int64_t o = 0; o < channels; ++o) {
      grad_bias[o] += sum(g + o * g_stride, n);
      for (int64_t c = 0; c < channels; ++c) grad_weight[o * channels + c] += dot(g + o * g_stride, x + c * x_stride, n);
    }
  }
};

// How memory splits into tiles: `samples` blocks of `pixels`, with the strides between channels and between pixels.
struct Tiling {
  int64_t channels, samples, pixels, channel_stride, pixel_stride, tile;

  Tiling(const Tensor& x, MemoryFormat format) : channels(x.size(1)), samples(x.size(0)), pixels(pixels_of(x)) {
    // Pixels that hold all their channels side by side form one long block.
    const bool interleaved = format == MemoryFormat::ChannelsLast || pixels == 1;
    if (interleaved) pixels *= samples, samples = 1;
    channel_stride = interleaved ? 1 : pixels;
    pixel_stride = interleaved ? channels : 1;
    tile = kTileElements / channels / 64 * 64;
  }

  int64_t tiles_per_sample() const { return (pixels + tile - 1) / tile; }
  int64_t tiles() const { return samples * tiles_per_sample(); }
  int64_t groups() const { return std::min(tiles(), kMaxGroups); }

  // f(group, offset, pixels) for every tile, groups on threads.
  template <class F>
  void for_tiles(const F& f) const {
    const int64_t cost = std::min(tile, pixels) * channels * (tiles() / groups());
    parallel_units(groups(), cost, [&](int64_t group) {
      const int64_t end = (group + 1) * tiles() / groups();
      for (int64_t t = group * tiles() / groups(); t < end; ++t) {
        const int64_t first = t % tiles_per_sample() * tile;
        f(group, t / tiles_per_sample() * channels * pixels + first * pixel_stride, std::min(tile, pixels - first));
      }
    });
  }

  Runs runs(int64_t n) const { return {channels, n, channel_stride, pixel_stride, tile}; }
};

// The rows of a tile: memory itself where it already has their type and shape, else a buffer.
template <class T>
struct Tile {
  T* rows;
  int64_t stride;

  Tile(const Tiling& tiling, Memory memory, int64_t offset, T* buffer) : rows(buffer), stride(tiling.tile) {
    if (memory.type != scalar_type_of<T> || tiling.pixel_stride != 1) return;
    rows = static_cast<T*>(memory.data) + offset;
    stride = tiling.channel_stride;
  }

  static Tile load(const Tiling& tiling, Memory from, int64_t offset, int64_t n, T* buffer) {
    const Tile tile(tiling, from, offset, buffer);
    if (tile.rows == buffer) gather(from, offset, buffer, tiling.runs(n));
    return tile;
  }

  void store(const Tiling& tiling, Memory to, int64_t offset, int64_t n, const T* buffer) const {
    if (rows == buffer) scatter(buffer, to, offset, tiling.runs(n));
  }
};

template <class T>
void forward(const Tiling& tiling, Memory x, const T* weight, const T* bias, Memory y) {
  tiling.for_tiles([&](int64_t, int64_t offset, int64_t n) {
    alignas(64) T in_buffer[kTileElements], out_buffer[kTileElements];
    const Tile<T> in = Tile<T>::load(tiling, x, offset, n, in_buffer);
    const Tile<T> out(tiling, y, offset, out_buffer);
    run_leaf<Mix<T>>(static_cast<const T*>(in.rows), in.stride, out.rows, out.stride, n, tiling.channels, weight, bias);
    out.store(tiling, y, offset, n, out_buffer);
  });
}

// Writes grad_x; returns grad_weight followed by grad_bias, from partial sums per group added in order.
template <class T>
std::vector<double> backward(const Tiling& tiling, Memory x, Memory grad_y, const T* transposed, Memory grad_x) {
  const int64_t channels = tiling.channels, size = channels * channels + channels;
  const std::vector<T> zeros(channels);
  std::vector<double> partial(tiling.groups() * size), total(size);
  tiling.for_tiles([&](int64_t group, int64_t offset, int64_t n) {
    alignas(64) T x_buffer[kTileElements], grad_buffer[kTileElements], out_buffer[kTileElements];
    const Tile<T> in = Tile<T>::load(tiling, x, offset, n, x_buffer);
    const Tile<T> grad = Tile<T>::load(tiling, grad_y, offset, n, grad_buffer);
    const Tile<T> out(tiling, grad_x, offset, out_buffer);
    run_leaf<Mix<T>>(static_cast<const T*>(grad.rows), grad.stride, out.rows, out.stride, n, channels, transposed, zeros.data());
    out.store(tiling, grad_x, offset, n, out_buffer);
    double* sums = partial.data() + group * size;
    run_leaf<OuterProduct<T>>(static_cast<const T*>(grad.rows), grad.stride, static_cast<const T*>(in.rows), in.stride, n,
                              channels, sums, sums + channels * channels);
  });
  for (size_t i = 0; i < partial.size(); ++i) total[i % size] += partial[i];
  return total;
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_flow_variable("conv1x1", "x", x);
  check_floating("conv1x1", "weight", weight);
  check_floating("conv1x1", "bias", bias);
  check_shape("conv1x1", "weight", weight, {x.size(1), x.size(1)});
  check_shape("conv1x1", "bias", bias, {x.size(1)});
  if (x.size(1) > kMaxChannels) fail("conv1x1", "x must have at most ", kMaxChannels, " channels here, got ", x.size(1));
}

// The matrix as T, by rows or (transposed) by columns.
template <class T>
std::vector<T> matrix_of(const Tensor& weight, bool transposed) {
  const int64_t channels = weight.size(0);
  std::vector<T> matrix(channels * channels);
  const Runs runs{channels, channels, transposed ? 1 : channels, transposed ? channels : 1, channels};
  gather(Memory::of(weight), 0, matrix.data(), runs);
  return matrix;
}

Tensor conv1x1_fwd(Tensor x, Tensor weight, Tensor bias) {
  check(x, weight, bias);
  const MemoryFormat format = format_of(x);
  x = as_format(x, format);
  weight = as_format(weight, MemoryFormat::Contiguous), bias = as_format(bias, MemoryFormat::Contiguous);
  Tensor y = empty_in(x, format);
  if (x.numel() == 0) return y;
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    std::vector<T> bias_values(x.size(1));
    gather(Memory::of(bias), 0, bias_values.data(), {1, x.size(1), 0, 1, 0});
    forward<T>(Tiling(x, format), Memory::of(x), matrix_of<T>(weight, false).data(), bias_values.data(), Memory::of(y));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv1x1_bwd(Tensor x, Tensor weight, Tensor bias, Tensor grad_y) {
  check(x, weight, bias);
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
    sums = backward<T>(Tiling(x, format), Memory::of(x), Memory::of(grad_y), matrix_of<T>(weight, true).data(), Memory::of(grad_x));
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
