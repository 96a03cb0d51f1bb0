// resample on the CPU: the binomial filter [1, 3, 3, 1], ×2 down or up along both axes, and its adjoint.
//
// Threads: about 16 Ki elements: some images, or some rows of one (an image is a channel's plane, or in channels_last a
// sample, whose pixels are `lanes` channels wide). Bytes: one read and one write. Rows are combined down the image
// first, into a row in L1 with a pixel of margin at both ends, then along it: polyphase, so no zeros are multiplied.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "common/resample_check.h"
#include "common/rows.h"
#include "common/tensor.h"
#include "network_formulas.h"

namespace hflow {
namespace {

constexpr int64_t kUnit = 16384;  // elements of the larger side that a unit of work touches

// An image on the smaller side has height × width pixels; on the larger, twice as many along each axis.
struct Image {
  int64_t height, width, lanes;
  bool up, adjoint;

  bool doubles() const { return up != adjoint; }
  int64_t in_height() const { return doubles() ? height : 2 * height; }
  int64_t in_row() const { return (doubles() ? width : 2 * width) * lanes; }
  int64_t out_row() const { return (doubles() ? 2 * width : width) * lanes; }
  int64_t out_rows_per_row() const { return doubles() ? 2 : 1; }
  // The edges are those of the forward direction's input.
  ResampleEdges edges(int64_t small) const { return ResampleEdges(up, up ? small : 2 * small); }
};

// Rows [begin, end) of the smaller side; `x` is the image's row `first`, `y` where the first result belongs.
template <class T, bool Doubles>
struct Resample {
  HFLOW_LEAF void add_scaled(T* __restrict row, const T* other, int64_t n, T weight) {
    for (int64_t i = 0; i < n; ++i) row[i] += weight * other[i];
  }

  HFLOW_LEAF void halve_rows(const T* a, const T* b, const T* c, const T* d, T* __restrict out, int64_t n, T weight) {
    for (int64_t i = 0; i < n; ++i) out[i] = halve(a[i], b[i], c[i], d[i], weight);
  }

  HFLOW_LEAF void double_rows(const T* near, const T* far, T* __restrict out, int64_t n, T weight) {
    for (int64_t i = 0; i < n; ++i) out[i] = doubled(near[i], far[i], weight);
  }

  // `row` has a pixel of margin before and after it.
  HFLOW_LEAF void along(T* row, T* __restrict y, const Image& image, ResampleEdges edges, T weight) {
    const int64_t lanes = image.lanes, width = image.width, length = image.in_row();
    if (!image.adjoint) {
      std::copy_n(row + edges.before * lanes, lanes, row - lanes);
      std::copy_n(row + edges.after * lanes, lanes, row + length);
    }
    if (lanes == 1) {
      if constexpr (Doubles) {
        for (int64_t i = 0; i < width; ++i) {
          y[2 * i] = doubled(row[i], row[i - 1], weight);
          y[2 * i + 1] = doubled(row[i], row[i + 1], weight);
        }
      } else {
        for (int64_t i = 0; i < width; ++i)
          y[i] = halve(row[2 * i - 1], row[2 * i], row[2 * i + 1], row[2 * i + 2], weight);
      }
    } else {
      for (int64_t i = 0; i < width; ++i) {
        if constexpr (Doubles) {
          const T* pixel = row + i * lanes;
          double_rows(pixel, pixel - lanes, y + 2 * i * lanes, lanes, weight);
          double_rows(pixel, pixel + lanes, y + (2 * i + 1) * lanes, lanes, weight);
        } else {
          const T* pixel = row + 2 * i * lanes;
          halve_rows(pixel - lanes, pixel, pixel + lanes, pixel + 2 * lanes, y + i * lanes, lanes, weight);
        }
      }
    }
    if (image.adjoint) {
      add_scaled(y + edges.before * lanes, row, lanes, weight);
      add_scaled(y + edges.after * lanes, row + length - lanes, lanes, weight);
    }
  }

  HFLOW_LEAF void run(const T* x, T* y, T* scratch, Image image, int64_t first, int64_t begin, int64_t end) {
    const T weight = resample_weight<T>(image.up);
    const int64_t n = image.in_height(), length = image.in_row();
    const ResampleEdges down = image.edges(image.height), across = image.edges(image.width);
    const T* zeros = scratch;  // never written, like the margins in the adjoint
    T* row = scratch + length + image.lanes;
    const auto at = [&](int64_t r) __attribute__((always_inline)) {
      if (r >= 0 && r < n) return x + (r - first) * length;
      return image.adjoint ? zeros : x + ((r < 0 ? down.before : down.after) - first) * length;
    };
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t o = Doubles ? 2 * i : i; o < (Doubles ? 2 * i + 2 : i + 1); ++o, y += image.out_row()) {
        if constexpr (Doubles) {
          double_rows(at(i), at(o == 2 * i ? i - 1 : i + 1), row, length, weight);
        } else {
          halve_rows(at(2 * i - 1), at(2 * i), at(2 * i + 1), at(2 * i + 2), row, length, weight);
        }
        if (image.adjoint && o == down.before) add_scaled(row, at(0), length, weight);
        if (image.adjoint && o == down.after) add_scaled(row, at(n - 1), length, weight);
        along(row, y, image, across, weight);
      }
    }
  }
};

template <class T, bool Doubles>
void resample(const Image& image, int64_t images, Memory x, Memory y) {
  const int64_t in_size = image.in_height() * image.in_row();
  const int64_t out_size = image.out_rows_per_row() * image.height * image.out_row();
  const int64_t images_per_unit = std::max<int64_t>(1, kUnit / std::max(in_size, out_size));
  const int64_t rows_per_unit =
      std::clamp<int64_t>(kUnit / (2 * std::max(image.in_row(), image.out_row())), 1, image.height);
  const int64_t bands = (image.height + rows_per_unit - 1) / rows_per_unit;
  const int64_t units = (images + images_per_unit - 1) / images_per_unit * bands;
  // Rows of the input around row i of the smaller side that its results need, those folded in from an edge included.
  const int64_t step = Doubles ? 1 : 2, before = 1, after = Doubles ? 1 : 2;
  const int64_t most_rows = std::min(image.in_height(), step * rows_per_unit + before + after);

  parallel_units(units, std::max(in_size, out_size) * images_per_unit / bands, [&](int64_t unit) {
    const int64_t begin = unit % bands * rows_per_unit, end = std::min(begin + rows_per_unit, image.height);
    const int64_t first = std::max<int64_t>(0, step * begin - before);
    const int64_t rows = std::min(image.in_height(), step * end + after) - first;
    const int64_t out_rows = image.out_rows_per_row() * (end - begin);
    std::vector<T> scratch(2 * (image.in_row() + image.lanes));
    const std::unique_ptr<T[]> in(x.type == scalar_type_of<T> ? nullptr : new T[most_rows * image.in_row()]);
    const std::unique_ptr<T[]> out(y.type == scalar_type_of<T> ? nullptr : new T[out_rows * image.out_row()]);
    const int64_t first_image = unit / bands * images_per_unit;
    for (int64_t i = first_image; i < std::min(first_image + images_per_unit, images); ++i) {
      const int64_t from = i * in_size + first * image.in_row();
      const int64_t to = i * out_size + begin * image.out_rows_per_row() * image.out_row();
      run_leaf<Resample<T, Doubles>>(load(x, from, rows * image.in_row(), in.get()), target(y, to, out.get()),
                                     scratch.data(), image, first, begin, end);
      store(out.get(), y, to, out_rows * image.out_row());
    }
  });
}

Tensor resample_fwd(Tensor x, bool up, bool adjoint) {
  const std::vector<int64_t> sizes = resampled_sizes(x, up, adjoint);
  const bool doubles = up != adjoint;
  const MemoryFormat format = format_of(x);
  x = as_format(x, format);
  Tensor y = empty_in(x, sizes, format);
  if (x.numel() == 0) return y;
  const Tensor& small = doubles ? x : y;
  const bool last = format == MemoryFormat::ChannelsLast;
  const Image image{small.size(2), small.size(3), last ? x.size(1) : 1, up, adjoint};
  const int64_t images = last ? x.size(0) : x.size(0) * x.size(1);
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if (doubles) {
      resample<T, true>(image, images, Memory::of(x), Memory::of(y));
    } else {
      resample<T, false>(image, images, Memory::of(x), Memory::of(y));
    }
  });
  return y;
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) { m.impl("resample_fwd", TORCH_BOX(&hflow::resample_fwd)); }
