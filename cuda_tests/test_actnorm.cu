// The kernels of csrc/cuda/actnorm.cuh against double on the host: dtypes, both memory formats, odd sizes, unaligned
// memory, more channels than a block's elements, empty inputs; the same bits in a second run.
#include "cuda/actnorm.cuh"

#include <string>
#include <type_traits>

#include "check.h"
#include "device.h"
#include "values.h"

namespace {

using hflow::cuda::ChannelShape;
using test::as_double;
using test::normal;
using test::same_bits;

struct Case {
  ChannelShape shape;
  bool inverse;
  size_t offset;  // elements by which x and y miss a 16-byte boundary
  std::string name;
};

template <class S, class T>
void test_case(const Case& c, double epsilon) {
  const ChannelShape& shape = c.shape;
  const int64_t n = shape.total(), channels = shape.channels, samples = shape.samples;
  const auto channel_of = [&](int64_t e) { return shape.by_rows ? e / shape.pixels % channels : e % channels; };
  const std::vector<S> x = normal<S>(n, 1), grad_y = normal<S>(n, 2);
  const std::vector<T> log_scale = normal<T>(channels, 3), bias = normal<T>(channels, 4),
                       grad_log_det = normal<T>(samples, 5);

  std::vector<double> grad_log_scale(channels), grad_bias(channels), magnitude(channels);
  double log_det = 0, grad_log_det_sum = 0;
  for (T s : log_scale) log_det += (c.inverse ? -1.0 : 1.0) * shape.pixels * double(s);
  for (T g : grad_log_det) grad_log_det_sum += double(g);
  for (int64_t k = 0; k < channels; ++k) grad_log_scale[k] = (c.inverse ? -1.0 : 1.0) * shape.pixels * grad_log_det_sum;
  std::vector<double> y(n), grad_x(n);
  for (int64_t e = 0; e < n; ++e) {
    const int64_t k = channel_of(e);
    const double scale = std::exp((c.inverse ? -1.0 : 1.0) * double(log_scale[k])), b = double(bias[k]),
                 g = as_double(grad_y[e]);
    y[e] = c.inverse ? (as_double(x[e]) - b) * scale : as_double(x[e]) * scale + b;
    grad_x[e] = g * scale;
    grad_log_scale[k] += g * (c.inverse ? -y[e] : as_double(x[e]) * scale);
    grad_bias[k] += c.inverse ? -g * scale : g;
    magnitude[k] += std::fabs(g) * (1 + std::fabs(y[e]) + std::fabs(as_double(x[e]) * scale));
  }

  const test::Buffer<S> x_device(x, c.offset), grad_device(grad_y, c.offset);
  const test::Buffer<T> scale_device(log_scale), bias_device(bias), grad_log_det_device(grad_log_det);
  const bool is_aligned = c.offset * sizeof(S) % 16 == 0;
  std::vector<S> first_y, first_grad_x;
  std::vector<T> first_log_det, first_scale, first_bias;
  for (int repeat = 0; repeat < 2; ++repeat) {
    test::Buffer<S> y_device(n, c.offset), grad_x_device(n, c.offset);
    test::Buffer<T> log_det_device(samples), grad_scale_device(channels), grad_bias_device(channels);
    test::Buffer<T> partial(hflow::cuda::actnorm_partial_size<S>(shape, is_aligned));
    test::require(
        hflow::cuda::actnorm_forward(x_device.data(), scale_device.data(), bias_device.data(), y_device.data(),
                                     log_det_device.data(), shape, c.inverse, cudaStream_t{}),
        "forward");
    test::require(
        hflow::cuda::actnorm_backward(x_device.data(), scale_device.data(), bias_device.data(), grad_device.data(),
                                      grad_log_det_device.data(), grad_x_device.data(), grad_scale_device.data(),
                                      grad_bias_device.data(), partial.data(), shape, c.inverse, cudaStream_t{}),
        "backward");
    const std::vector<S> got_y = y_device.read(), got_grad_x = grad_x_device.read();
    const std::vector<T> got_log_det = log_det_device.read(), got_scale = grad_scale_device.read(),
                         got_bias = grad_bias_device.read();
    partial.read();
    if (repeat == 0) {
      first_y = got_y, first_grad_x = got_grad_x, first_log_det = got_log_det, first_scale = got_scale,
      first_bias = got_bias;
      for (int64_t e = 0; e < n; ++e) {
        test::expect_close(c.name + "y", as_double(got_y[e]), y[e], 4 * epsilon);
        test::expect_close(c.name + "grad_x", as_double(got_grad_x[e]), grad_x[e], 4 * epsilon);
      }
      const double sum_epsilon = std::is_same_v<T, double> ? 1e-14 : 1e-6;
      for (T value : got_log_det) test::expect_close(c.name + "log_det", double(value), log_det, sum_epsilon);
      for (int64_t k = 0; k < channels; ++k) {
        const double scale = 1 + magnitude[k];
        test::expect_close(c.name + "grad_log_scale", double(got_scale[k]) / scale, grad_log_scale[k] / scale,
                           sum_epsilon);
        test::expect_close(c.name + "grad_bias", double(got_bias[k]) / scale, grad_bias[k] / scale, sum_epsilon);
      }
    } else if (!same_bits(got_y, first_y) || !same_bits(got_grad_x, first_grad_x) ||
               !same_bits(got_log_det, first_log_det) || !same_bits(got_scale, first_scale) ||
               !same_bits(got_bias, first_bias)) {
      ++test::failures;
      std::printf("FAILED %s: a second run gave other bits\n", c.name.c_str());
    }
  }
}

template <class S, class T>
void test_type(const char* type, double epsilon) {
  const ChannelShape shapes[] = {
      {2, 3, 64, true},   {3, 5, 49, true},  {1, 4, 1030, true}, {2, 1, 3, true},     {9, 2, 2, true},
      {2, 3, 64, false},  {3, 5, 49, false}, {7, 12, 33, false}, {4, 37, 3, false},   {1, 1, 1, false},
      {0, 3, 4, true},   {2, 0, 4, true},    {2, 3, 0, false},
  };
  for (const ChannelShape& shape : shapes) {
    for (bool inverse : {false, true}) {
      for (size_t offset : {0, 1}) {
        const std::string name = std::string(type) + " (" + std::to_string(shape.samples) + ", " +
                                 std::to_string(shape.channels) + ", " + std::to_string(shape.pixels) +
                                 (shape.by_rows ? ") rows" : ") channels last") + (inverse ? ", inverse" : "") +
                                 (offset ? ", unaligned: " : ": ");
        test_case<S, T>({shape, inverse, offset, name}, epsilon);
      }
    }
  }
}

}  // namespace

int main() {
  test::skip_without_gpu();
  // More channels than the elements of a block: many blocks, so once.
  test_case<float, float>({{1, 1100, 2, false}, true, 0, "float32, 1100 channels last: "}, 1.5e-7);
  test_type<float, float>("float32", 1.5e-7);
  test_type<double, double>("float64", 5e-16);
  test_type<__nv_bfloat16, float>("bfloat16", 4e-3);
  test_type<__half, float>("float16", 5e-4);
  return test::report();
}
