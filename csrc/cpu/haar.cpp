// haar on the CPU: the orthonormal Haar transform of every 2^levels block of pixels, forward and inverse.
//
// Threads: rows of blocks of some channels. Bytes: one read and one write of x for any number of levels. Splitting all
// bands at every level makes the transform of a block a Walsh–Hadamard transform of its n = 2^(levels·dims) pixels:
// slot k of the n is a position before it and a band after it, so it runs in place on n rows of neighbouring blocks.
// The commonest case, one level of contiguous float images, needs no buffer in between.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>
#include <vector>

#include "common/haar_shape.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace hflow {
namespace {

constexpr int64_t kTileElements = 4096;   // of a unit's buffer, which stays in L1
constexpr int64_t kUnitElements = 16384;  // of a unit without a buffer
constexpr int64_t kPlanes = 4;            // that a unit reads or writes at once where every channel is a plane

// In-place Walsh–Hadamard transform across n rows (a power of two), scaled after it, or before it if `inverse`.
template <class T>
struct WalshHadamard {
  HFLOW_LEAF void scale(T* rows, int64_t n, int64_t length, const T* gains) {
    for (int64_t k = 0; k < n; ++k)
      for (int64_t i = 0; i < length; ++i) rows[k * length + i] *= gains[k];
  }

  HFLOW_LEAF void butterfly(T* __restrict a, T* __restrict b, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      const T sum = a[i] + b[i], difference = a[i] - b[i];
      a[i] = sum;
      b[i] = difference;
    }
  }

  HFLOW_LEAF void run(T* rows, int64_t n, int64_t length, const T* gains, bool inverse) {
    if (inverse) scale(rows, n, length, gains);
    for (int64_t half = 1; half < n; half *= 2)
      for (int64_t k = 0; k < n; k += 2 * half)
        for (int64_t j = k; j < k + half; ++j) butterfly(rows + j * length, rows + (j + half) * length, length);
    if (!inverse) scale(rows, n, length, gains);
  }
};

// One level of a contiguous image: `rows` rows of 2 × 2 blocks and the four planes of their bands, without a buffer.
template <class T>
struct Blocks {
  HFLOW_LEAF void forward(const T* image, T* bands, int64_t band, int64_t rows, int64_t blocks, T average, T gain) {
    for (int64_t i = 0; i < rows; ++i, image += 4 * blocks, bands += blocks) {
      const T *top = image, *bottom = image + 2 * blocks;
      T *b0 = bands, *b1 = b0 + band, *b2 = b1 + band, *b3 = b2 + band;
#pragma GCC ivdep
      for (int64_t j = 0; j < blocks; ++j) {
        const T top_sum = top[2 * j] + top[2 * j + 1], top_difference = top[2 * j] - top[2 * j + 1];
        const T sum = bottom[2 * j] + bottom[2 * j + 1], difference = bottom[2 * j] - bottom[2 * j + 1];
        b0[j] = (top_sum + sum) * average;
        b1[j] = (top_difference + difference) * gain;
        b2[j] = (top_sum - sum) * gain;
        b3[j] = (top_difference - difference) * gain;
      }
    }
  }

  HFLOW_LEAF void inverse(const T* bands, T* image, int64_t band, int64_t rows, int64_t blocks, T average, T gain) {
    for (int64_t i = 0; i < rows; ++i, image += 4 * blocks, bands += blocks) {
      T *top = image, *bottom = image + 2 * blocks;
      const T *b0 = bands, *b1 = b0 + band, *b2 = b1 + band, *b3 = b2 + band;
#pragma GCC ivdep
      for (int64_t j = 0; j < blocks; ++j) {
        const T plus = b0[j] * average + b1[j] * gain, minus = b0[j] * average - b1[j] * gain;
        const T sum = (b2[j] + b3[j]) * gain, difference = (b2[j] - b3[j]) * gain;
        top[2 * j] = plus + sum;
        top[2 * j + 1] = minus + difference;
        bottom[2 * j] = plus - sum;
        bottom[2 * j + 1] = minus - difference;
      }
    }
  }

  HFLOW_LEAF void run(T* image, T* bands, int64_t band, int64_t rows, int64_t blocks, T average, T gain,
                      bool inverted) {
    if (inverted) {
      inverse(bands, image, band, rows, blocks, average, gain);
    } else {
      forward(image, bands, band, rows, blocks, average, gain);
    }
  }
};

// One of the two tensors: strides in elements, all but `slot` in units of blocks.
struct Side {
  Memory memory;
  int64_t sample, colour;
  std::vector<int64_t> axes;
  std::vector<int64_t> slot;  // where pixel or band k of a block lies

  int64_t at(int64_t sample_index, int64_t colour_index, int64_t row, const std::vector<int64_t>& blocks) const {
    int64_t offset = sample_index * sample + colour_index * colour;
    for (int64_t axis = static_cast<int64_t>(axes.size()) - 2; axis >= 0; --axis) {
      offset += row % blocks[axis] * axes[axis];
      row /= blocks[axis];
    }
    return offset;
  }
};

// The bits of slot k are the band numbers of all levels, the first level's highest; a band number has one bit per axis,
// the last axis lowest. Bit by bit, they are also the coordinates of pixel k in its block.
struct Slots {
  int64_t dims, levels, count = int64_t{1} << (dims * levels);

  int64_t band(int64_t k, int64_t level) const {
    return k >> (dims * (levels - 1 - level)) & ((int64_t{1} << dims) - 1);
  }

  Side image(const Tensor& x) const {
    Side side{Memory::of(x), x.stride(0), x.stride(1), {}, std::vector<int64_t>(count)};
    for (int64_t axis = 0; axis < dims; ++axis) {
      const int64_t stride = x.stride(2 + axis);
      side.axes.push_back(stride << levels);
      for (int64_t k = 0; k < count; ++k)
        for (int64_t level = 0; level < levels; ++level)
          side.slot[k] += ((band(k, level) >> (dims - 1 - axis) & 1) << level) * stride;
    }
    return side;
  }

  // Channels are (colour, band of level 1, band of level 2, …), or (…, band of level 2, band of level 1, colour).
  Side bands(const Tensor& y, bool by_colour) const {
    const int64_t colours = y.size(1) / count;
    Side side{Memory::of(y), y.stride(0), y.stride(1) * (by_colour ? count : 1), {}, std::vector<int64_t>(count)};
    for (int64_t axis = 0; axis < dims; ++axis) side.axes.push_back(y.stride(2 + axis));
    for (int64_t k = 0; k < count; ++k) {
      int64_t reversed = 0;
      for (int64_t level = 0; level < levels; ++level) reversed += band(k, level) << (dims * level);
      side.slot[k] = (by_colour ? k : reversed * colours) * y.stride(1);
    }
    return side;
  }

  template <class T>
  std::vector<T> gains(double gain, double average_gain) const {
    std::vector<T> gains;
    for (int64_t k = 0; k < count; ++k) {
      double product = 1;
      for (int64_t level = 0; level < levels; ++level)
        product *= gain * std::exp2(-0.5 * static_cast<double>(dims)) * (band(k, level) == 0 ? average_gain : 1.0);
      gains.push_back(static_cast<T>(product));
    }
    return gains;
  }
};

// A unit of work is a row of blocks of some colours; of the two, `inner` is the one that lies side by side in memory.
template <class T>
void transform(const Slots& slots, const Side& from, const Side& to, const Tensor& bands, const std::vector<T>& gains,
               bool inverse) {
  const int64_t n = slots.count, colours = bands.size(1) / n;
  const std::vector<int64_t> blocks(bands.sizes().begin() + 2, bands.sizes().end());
  const int64_t rows = bands.numel() / (bands.size(0) * bands.size(1) * blocks.back());
  const bool colours_inner = bands.stride(1) == 1;
  const int64_t tile = std::max<int64_t>(1, kTileElements / n);
  const int64_t row_tile = std::min(blocks.back(), tile);
  // Planes of powers of two share cache sets: more than a few at a time evict each other's lines between two slots.
  const int64_t most_colours = colours_inner ? colours : std::min(colours, kPlanes);
  const int64_t colour_tile = std::min(most_colours, std::max<int64_t>(1, tile / row_tile));
  const int64_t colour_tiles = (colours + colour_tile - 1) / colour_tile;

  parallel_units(bands.size(0) * rows * colour_tiles, n * blocks.back() * colour_tile, [&](int64_t unit) {
    const int64_t colour = unit % colour_tiles * colour_tile, row = unit / colour_tiles % rows,
                  sample = unit / colour_tiles / rows;
    const int64_t from_at = from.at(sample, colour, row, blocks), to_at = to.at(sample, colour, row, blocks);
    const int64_t unit_colours = std::min(colour_tile, colours - colour);
    const std::unique_ptr<T[]> buffer(new T[n * row_tile * unit_colours]);
    for (int64_t begin = 0; begin < blocks.back(); begin += row_tile) {
      const int64_t unit_blocks = std::min(row_tile, blocks.back() - begin), length = unit_blocks * unit_colours;
      const auto runs = [&](const Side& side) {
        return colours_inner ? Runs{unit_blocks, unit_colours, side.axes.back(), side.colour, unit_colours}
                             : Runs{unit_colours, unit_blocks, side.colour, side.axes.back(), unit_blocks};
      };
      for (int64_t k = 0; k < n; ++k)
        gather(from.memory, from_at + begin * from.axes.back() + from.slot[k], buffer.get() + k * length, runs(from));
      run_leaf<WalshHadamard<T>>(buffer.get(), n, length, gains.data(), inverse);
      for (int64_t k = 0; k < n; ++k)
        scatter(buffer.get() + k * length, to.memory, to_at + begin * to.axes.back() + to.slot[k], runs(to));
    }
  });
}

// One level of contiguous images of dtype T. A unit of work is some rows of blocks of one colour, or some colours.
template <class T>
void transform_planes(const Side& image, const Side& bands, const Tensor& y, const std::vector<T>& gains,
                      bool inverse) {
  const int64_t height = y.size(2), blocks = y.size(3), colours = y.size(1) / 4;
  const int64_t rows = std::min(height, std::max<int64_t>(1, kUnitElements / (4 * blocks)));
  const int64_t pieces = (height + rows - 1) / rows;
  T *const image_data = static_cast<T*>(image.memory.data), *const bands_data = static_cast<T*>(bands.memory.data);
  parallel_units(y.size(0) * colours * pieces, 4 * rows * blocks, [&](int64_t unit) {
    const int64_t plane = unit / pieces, row = unit % pieces * rows;
    const int64_t sample = plane / colours, colour = plane % colours;
    run_leaf<Blocks<T>>(image_data + plane * 4 * height * blocks + row * 4 * blocks,
                        bands_data + sample * bands.sample + colour * bands.colour + row * blocks, bands.slot[1],
                        std::min(rows, height - row), blocks, gains[0], gains[1], inverse);
  });
}

Tensor haar_fwd(Tensor x, int64_t levels, bool by_colour, double gain, double average_gain, bool inverse) {
  const std::vector<int64_t> sizes = haar_shape(x, levels, inverse);
  const MemoryFormat format = format_of(x);
  x = as_format(x, format);
  Tensor y = empty_in(x, sizes, format);
  if (x.numel() == 0) return y;
  const Slots slots{x.dim() - 2, levels};
  const Tensor &image = inverse ? y : x, &bands = inverse ? x : y;
  const Side image_side = slots.image(image), bands_side = slots.bands(bands, by_colour);
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const std::vector<T> gains = slots.gains<T>(gain, average_gain);
    if (x.dim() == 4 && levels == 1 && format == MemoryFormat::Contiguous && x.scalar_type() == scalar_type_of<T>) {
      return transform_planes<T>(image_side, bands_side, bands, gains, inverse);
    }
    transform<T>(slots, inverse ? bands_side : image_side, inverse ? image_side : bands_side, bands, gains, inverse);
  });
  return y;
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) { m.impl("haar_fwd", TORCH_BOX(&hflow::haar_fwd)); }
