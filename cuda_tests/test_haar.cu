// The kernels of csrc/cuda/haar.cuh against one level after another in double on the host: dimensions, levels, dtypes,
// memory formats, channel orders, gains, both directions, sizes that fill vectors and that do not, unaligned memory.
#include "cuda/haar.cuh"

#include <cmath>
#include <random>
#include <string>
#include <type_traits>

#include "check.h"
#include "device.h"

namespace {

using hflow::cuda::HaarShape;

struct Case {
  HaarShape shape;
  bool by_colour, inverse;
  size_t offset;  // elements by which the tensors miss a 16-byte boundary
};

constexpr double kGain = 1.3, kAverageGain = 0.7;

// A tensor (B, C, spatial sizes) in row-major order.
struct Array {
  int64_t samples, channels;
  std::vector<int64_t> sizes;
  std::vector<double> values;

  int64_t pixels() const {
    int64_t pixels = 1;
    for (int64_t size : sizes) pixels *= size;
    return pixels;
  }
  double& at(int64_t sample, int64_t channel, const std::vector<int64_t>& place) {
    int64_t index = sample * channels + channel;
    for (size_t axis = 0; axis < sizes.size(); ++axis) index = index * sizes[axis] + place[axis];
    return values[index];
  }
};

// One level: image ↔ bands; f(pixel of the image, band of the other, weight) for all pairs.
template <class F>
void for_pairs(Array& image, Array& bands, bool by_colour, const F& f) {
  const int dims = static_cast<int>(image.sizes.size()), count = 1 << dims;
  std::vector<int64_t> block(dims), pixel(dims);
  for (int64_t e = 0; e < bands.pixels(); ++e) {
    int64_t rest = e;
    for (int axis = dims - 1; axis >= 0; --axis) block[axis] = rest % bands.sizes[axis], rest /= bands.sizes[axis];
    for (int64_t b = 0; b < image.samples; ++b)
      for (int64_t c = 0; c < image.channels; ++c)
        for (int band = 0; band < count; ++band)
          for (int corner = 0; corner < count; ++corner) {
            double sign = 1;
            for (int axis = 0; axis < dims; ++axis) {
              const int bit = dims - 1 - axis, second = corner >> bit & 1;
              pixel[axis] = 2 * block[axis] + second;
              if (second && (band >> bit & 1)) sign = -sign;
            }
            const double weight = sign * std::pow(2.0, -0.5 * dims) * kGain * (band == 0 ? kAverageGain : 1.0);
            f(image.at(b, c, pixel), bands.at(b, by_colour ? c * count + band : band * image.channels + c, block),
              weight);
          }
  }
}

Array empty(int64_t samples, int64_t channels, const std::vector<int64_t>& sizes) {
  Array array{samples, channels, sizes, {}};
  array.values.resize(samples * channels * array.pixels());
  return array;
}

Array expected(Array x, int levels, bool by_colour, bool inverse) {
  const int dims = static_cast<int>(x.sizes.size());
  for (int level = 0; level < levels; ++level) {
    std::vector<int64_t> sizes = x.sizes;
    for (int64_t& size : sizes) size = inverse ? size * 2 : size / 2;
    Array y = empty(x.samples, inverse ? x.channels >> dims : x.channels << dims, sizes);
    if (inverse) {
      for_pairs(y, x, by_colour, [](double& pixel, double& band, double weight) { pixel += weight * band; });
    } else {
      for_pairs(x, y, by_colour, [](double& pixel, double& band, double weight) { band += weight * pixel; });
    }
    x = y;
  }
  return x;
}

// Where element `index` of `array` lies in memory.
int64_t place(const Array& array, int64_t index, bool channels_last) {
  if (!channels_last) return index;
  const int64_t pixels = array.pixels(), pixel = index % pixels, channel = index / pixels % array.channels;
  return (index / pixels / array.channels * pixels + pixel) * array.channels + channel;
}

template <class S, class T>
void test_case(const Case& c, const std::string& name, double epsilon) {
  const HaarShape& shape = c.shape;
  std::vector<int64_t> sizes(shape.blocks, shape.blocks + shape.dims);
  if (!c.inverse)
    for (int64_t& size : sizes) size <<= shape.levels;
  Array x = empty(shape.samples, c.inverse ? shape.colours << (shape.dims * shape.levels) : shape.colours, sizes);
  const int64_t n = static_cast<int64_t>(x.values.size());
  std::mt19937 generator(1);
  std::normal_distribution<double> normal;
  std::vector<S> memory(n);
  for (int64_t e = 0; e < n; ++e) {
    const S value = static_cast<S>(static_cast<T>(normal(generator)));
    memory[place(x, e, shape.channels_last)] = value;
    x.values[e] = static_cast<double>(static_cast<T>(value));
  }
  const Array y = expected(x, shape.levels, c.by_colour, c.inverse);
  const test::Buffer<S> from(memory, c.offset), to(n, c.offset);
  test::require(hflow::cuda::haar<S, T>(from.data(), to.data(), shape, c.by_colour, kGain, kAverageGain, c.inverse,
                                        cudaStream_t{}),
                "haar");
  const std::vector<S> got = to.read();
  for (int64_t e = 0; e < n; ++e)
    test::expect_close(name, static_cast<double>(static_cast<T>(got[place(y, e, shape.channels_last)])), y.values[e],
                       epsilon);
}

template <class S, class T>
void test_type(const std::string& type, double epsilon) {
  const HaarShape shapes[] = {
      {1, 1, 3, 2, {16}, false},      {1, 1, 2, 3, {5}, false},        {1, 2, 2, 1, {24}, false},
      {1, 2, 1, 2, {7}, false},       {2, 1, 2, 3, {4, 8}, false},     {2, 1, 1, 2, {3, 5}, false},
      {2, 1, 40, 2, {2, 16}, false},  {2, 2, 2, 2, {2, 8}, false},     {2, 2, 1, 3, {3, 3}, false},
      {2, 3, 1, 2, {2, 4}, false},    {2, 3, 1, 1, {1, 3}, false},     {3, 1, 2, 2, {2, 3, 8}, false},
      {3, 1, 1, 3, {1, 2, 3}, false}, {2, 1, 2, 3, {3, 4}, true},      {2, 1, 2, 8, {2, 5}, true},
      {2, 2, 1, 3, {2, 3}, true},     {2, 2, 2, 16, {1, 2}, true},     {2, 3, 1, 3, {2, 1}, true},
      {2, 3, 1, 4, {1, 2}, true},     {2, 1, 0, 3, {4, 8}, false},     {2, 1, 2, 3, {0, 8}, false},
  };
  for (const HaarShape& shape : shapes)
    for (bool by_colour : {true, false})
      for (bool inverse : {false, true})
        for (size_t offset : {0, 1}) {
          const std::string name =
              type + ", " + std::to_string(shape.dims) + " dimensions, " + std::to_string(shape.levels) + " levels, " +
              std::to_string(shape.colours) + " colours, " + std::to_string(shape.blocks[shape.dims - 1]) + " blocks" +
              (shape.channels_last ? ", channels last" : "") + (by_colour ? ", by colour" : ", wavelet") +
              (inverse ? ", inverse" : "") + (offset ? ", unaligned" : "");
          test_case<S, T>({shape, by_colour, inverse, offset}, name, epsilon);
        }
}

__global__ void take_kernel(int64_t index, int64_t size, int64_t* results) {
  if (threadIdx.x > 0) return;
  results[0] = hflow::cuda::take(index, size);
  results[1] = index;
}

// Divisions on both sides of 2³².
void test_take() {
  for (int64_t index : {int64_t{0}, int64_t{12345}, (int64_t{1} << 32) - 1, int64_t{1} << 32, int64_t{7} << 40})
    for (int64_t size : {int64_t{1}, int64_t{7}, (int64_t{1} << 32) - 1, (int64_t{1} << 32) + 1}) {
      const test::Buffer<int64_t> results(2);
      hflow::cuda::launch(take_kernel, 1, cudaStream_t{}, index, size, results.data());
      const std::vector<int64_t> got = results.read();
      test::expect_close("remainder", double(got[0]), double(index % size), 0);
      test::expect_close("quotient", double(got[1]), double(index / size), 0);
    }
}

}  // namespace

int main() {
  test::skip_without_gpu();
  test_type<float, float>("float32", 1e-6);
  test_type<double, double>("float64", 2e-15);
  test_type<__nv_bfloat16, float>("bfloat16", 5e-3);
  test_type<__half, float>("float16", 6e-4);
  test_take();
  return test::report();
}
