// conv3x3 on the CPU: a 3×3 convolution with zeros around it, in float32 and channels_last, and its backward.
//
// Winograd's F(4×4, 3×3): a quarter of the multiplications. Threads: forward, chunks of tiles, each taken through input
// transform, 36 products and output transform while it stays in L2; the gradient of x is the same with turned weights.
// The gradient of the weights: slices of tiles transformed side by side, then their products point by point. Sums run
// in an order that threads do not change. Bytes: x is read 2.25 times, y written once; weights are read once and written
// and read 4 times as large, which pays as long as there are a few dozen tiles.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/conv3x3_check.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "cpu/panel_product.h"
#include "cpu/winograd.h"

namespace hflow {
namespace {

using namespace winograd;

constexpr int64_t kRows = Product<64>::kRows;  // tiles that a product takes at a time
constexpr int64_t kChunk = 8 * kRows;          // tiles at most
constexpr int64_t kLargeChunk = 24 * kRows;    // the same where weights are so large that reading them takes longest
constexpr int64_t kLarge = 256 * 256;          // products of channels above which they are
// Terms of a sum in registers; fewer tiles than channels, for there are more of them to add up.
constexpr int64_t kChannelsAtOnce = 64, kTilesAtOnce = 48;
constexpr int64_t kSlice = 24;                 // tiles that a thread transforms at a time for the weights' gradient
constexpr int64_t kFewestTiles = 4 * kSlice, kMostTiles = 16 * kSlice;  // transformed before their products are made

// One group of a convolution: its shapes and the part of each tensor that belongs to it.
struct Group {
  Image in, out;
  int64_t tiles;  // of all samples
  std::vector<float> zeros;

  Group(const Tensor& x, int64_t outputs, int64_t groups)
      : in{x.size(2), x.size(3), x.size(1) / groups, x.size(1)},
        out{x.size(2), x.size(3), outputs / groups, outputs},
        tiles(x.size(0) * in.tiles()),
        zeros(padded(std::max(in.channels, out.channels))) {}
};

// Weights at all points: (point, panel of outputs, input, output), for a map from `in` to `out` channels.
class WeightPoints {
 public:
  // `weight` is (to, 3, 3, from). `turned`: for the map back, from the outputs' gradients to the inputs'.
  WeightPoints(const float* weight, int64_t to, int64_t from, bool turned)
      : inputs_(turned ? to : from),
        outputs_(turned ? from : to),
        panels_((outputs_ + kPanel - 1) / kPanel),
        stride_(spread(panels_ * inputs_ * kPanel)),
        points_(kPoints * stride_) {
    parallel_units(panels_ * inputs_, kPoints * kPanel, [&](int64_t unit) {
      const int64_t panel = unit / inputs_, input = unit % inputs_, first = panel * kPanel;
      const int64_t count = std::min(kPanel, outputs_ - first);
      alignas(64) float taps[kTaps * kTaps][kPanel] = {};
      for (int64_t tap = 0; tap < kTaps * kTaps; ++tap) {
        if (turned) {
          std::copy_n(weight + (input * kTaps * kTaps + kTaps * kTaps - 1 - tap) * from + first, count, taps[tap]);
        } else {
          const float* column = weight + (first * kTaps * kTaps + tap) * from + input;
          for (int64_t o = 0; o < count; ++o) taps[tap][o] = column[o * kTaps * kTaps * from];
        }
      }
      run_wide_leaf<ToWeightPoints>(static_cast<const float*>(taps[0]), kPanel, padded(count),
                                    points_.get() + unit * kPanel, stride_);
    });
  }

  Right at(int64_t point) const { return {points_.get() + point * stride_, kPanel, inputs_ * kPanel}; }

 private:
  int64_t inputs_, outputs_, panels_, stride_;
  Scratch points_;
};

// Tiles of a chunk: no more than a thread's share.
int64_t chunk_of(const Group& group) {
  const int64_t most = group.in.channels * group.out.channels > kLarge ? kLargeChunk : kChunk;
  const int64_t shares = torch::stable::get_num_threads() * kRows;
  return std::min(most, (group.tiles + shares - 1) / shares * kRows);
}

// y = weights * x + bias for one group, from image `in` to image `out`.
void convolve(const float* x, const Image& in, const WeightPoints& weights, const float* bias, const Image& out,
              float* y, const Group& group) {
  const int64_t chunk_tiles = chunk_of(group), chunks = (group.tiles + chunk_tiles - 1) / chunk_tiles;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const int64_t in_row = padded(in.channels), out_row = padded(out.channels);
    const Scratch inputs(kPoints * spread(chunk_tiles * in_row));
    const Scratch outputs(kPoints * spread(chunk_tiles * out_row));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunk_tiles, last = std::min(first + chunk_tiles, group.tiles), n = last - first;
      run_wide_leaf<ToPoints<InputMap, 1>::Wide>(x, in, first, last, group.zeros.data(), inputs.get(), in_row,
                                                 spread(n * in_row));
      for (int64_t point = 0; point < kPoints; ++point)
        run_wide_leaf<Product>(Left{inputs.get() + point * spread(n * in_row), in_row, 1}, weights.at(point),
                               Result{outputs.get() + point * spread(n * out_row), out_row}, n, out_row, in.channels,
                               kChannelsAtOnce, false);
      run_wide_leaf<ToOutputs>(static_cast<const float*>(outputs.get()), first, last, bias, out, y);
    }
  });
}

// Floats between rows that are read in columns: an odd number of cache lines, or they would meet in a few of its sets.
int64_t column_stride(int64_t channels) { return (padded(channels) / kWidest | 1) * kWidest; }

// Tiles between two additions to the sums of the weights' gradient: where there are many channels these are larger than
// what is added to them, and are better left in peace.
int64_t gradient_tiles(const Group& group) {
  const int64_t in = group.in.channels, out = group.out.channels, balanced = in * out * 3 / 2 / (in + out);
  return std::min(std::clamp((balanced + kSlice - 1) / kSlice * kSlice, kFewestTiles, kMostTiles), group.tiles);
}

// The gradients of a group's weights, (out, 3, 3, in), and bias.
void weight_gradient(const float* x, const float* grad_y, const Group& group, float* grad_weight, float* grad_bias) {
  const Image &in = group.in, &out = group.out;
  const int64_t in_row = padded(in.channels), in_stride = column_stride(in.channels);
  const int64_t out_stride = column_stride(out.channels), at_once = gradient_tiles(group);
  const int64_t in_floats = spread(at_once * in_stride), out_floats = spread(at_once * out_stride);
  const int64_t point_floats = spread(out.channels * in_row);
  const Scratch inputs(kPoints * in_floats), gradients(kPoints * out_floats), sums(kPoints * point_floats);
  std::vector<double> bias(out.channels);
  for (int64_t begin = 0; begin < group.tiles; begin += at_once) {
    const int64_t tiles = std::min(at_once, group.tiles - begin);
    torch::stable::parallel_for(0, (tiles + kSlice - 1) / kSlice, 1, [&](int64_t from, int64_t to) {
      for (int64_t tile = from * kSlice, end = std::min(to * kSlice, tiles); tile < end; tile += kSlice) {
        const int64_t first = begin + tile, last = begin + std::min(tile + kSlice, tiles);
        run_wide_leaf<ToPoints<InputMap, 1>::Wide>(x, in, first, last, group.zeros.data(),
                                                   inputs.get() + tile * in_stride, in_stride, in_floats);
        run_wide_leaf<ToPoints<OutputGradientMap, 0>::Wide>(grad_y, out, first, last, group.zeros.data(),
                                                            gradients.get() + tile * out_stride, out_stride,
                                                            out_floats);
      }
    });
    torch::stable::parallel_for(0, kPoints, 1, [&](int64_t from, int64_t to) {
      for (int64_t point = from; point < to; ++point) {
        const float *rows = gradients.get() + point * out_floats, *columns = inputs.get() + point * in_floats;
        run_wide_leaf<Product>(Left{rows, 1, out_stride}, Right{columns, in_stride, kPanel},
                               Result{sums.get() + point * point_floats, in_row}, out.channels, in_row, tiles,
                               kTilesAtOnce, begin > 0);
        if (point == kSumPoint) run_leaf<AddRows>(rows, out_stride, tiles, out.channels, bias.data());
      }
    });
  }
  parallel_units(out.channels, kPoints * in_row, [&](int64_t o) {
    run_wide_leaf<ToTaps>(static_cast<const float*>(sums.get()) + o * in_row, point_floats, in.channels,
                          grad_weight + o * kTaps * kTaps * in.channels);
  });
  std::copy(bias.begin(), bias.end(), grad_bias);
}

const float* read(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }
float* write(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

Tensor conv3x3_fwd(Tensor x, Tensor weight, Tensor bias, int64_t groups) {
  check_conv3x3(x, weight, bias, groups);
  x = as_format(x, MemoryFormat::ChannelsLast), weight = as_format(weight, MemoryFormat::ChannelsLast);
  bias = as_format(bias, MemoryFormat::Contiguous);
  const int64_t outputs = weight.size(0);
  Tensor y = empty_in(x, std::vector<int64_t>{x.size(0), outputs, x.size(2), x.size(3)}, MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const Group group(x, outputs, groups);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t o = g * group.out.channels, c = g * group.in.channels;
    const WeightPoints points(read(weight) + o * kTaps * kTaps * group.in.channels, group.out.channels,
                              group.in.channels, false);
    convolve(read(x) + c, group.in, points, read(bias) + o, group.out, write(y) + o, group);
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv3x3_bwd(Tensor x, Tensor weight, Tensor bias, Tensor grad_y, int64_t groups) {
  check_conv3x3(x, weight, bias, groups);
  check_conv3x3_gradient(x, weight, grad_y);
  x = as_format(x, MemoryFormat::ChannelsLast), weight = as_format(weight, MemoryFormat::ChannelsLast);
  grad_y = as_format(grad_y, MemoryFormat::ChannelsLast);
  Tensor grad_x = empty_in(x, MemoryFormat::ChannelsLast), grad_weight = empty_in(weight, MemoryFormat::ChannelsLast);
  Tensor grad_bias = empty_in(bias, MemoryFormat::Contiguous);
  if (grad_y.numel() == 0) {
    for (const Tensor& gradient : {grad_x, grad_weight, grad_bias}) std::fill_n(write(gradient), gradient.numel(), 0.f);
    return {grad_x, grad_weight, grad_bias};
  }
  const Group group(x, weight.size(0), groups);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t o = g * group.out.channels, c = g * group.in.channels;
    const int64_t w = o * kTaps * kTaps * group.in.channels;
    const WeightPoints points(read(weight) + w, group.out.channels, group.in.channels, true);
    convolve(read(grad_y) + o, group.out, points, group.zeros.data(), group.in, write(grad_x) + c, group);
    weight_gradient(read(x) + c, read(grad_y) + o, group, write(grad_weight) + w, write(grad_bias) + o);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("conv3x3_fwd", TORCH_BOX(&hflow::conv3x3_fwd));
  m.impl("conv3x3_bwd", TORCH_BOX(&hflow::conv3x3_bwd));
}
