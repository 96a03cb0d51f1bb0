// The kernels of csrc/cuda/conv1x1.cuh against double on the host: dtypes, both memory formats, 1 to 32 channels, pixel
// counts that tiles and vectors do not divide, several samples per tile and several tiles per sample, more tiles than
// backward has blocks, unaligned memory, empty inputs; the same bits in a second run.
#include "cuda/conv1x1.cuh"

#include <random>

#include "check.h"
#include "device.h"
#include "values.h"

namespace {

using hflow::cuda::MixShape;

template <class S, class T>
void test_case(const MixShape& shape, size_t offset, const std::string& type, double epsilon) {
  const std::string name = type + " (" + std::to_string(shape.samples) + ", " + std::to_string(shape.channels) + ", " +
                           std::to_string(shape.pixels) + (shape.by_rows ? ") rows" : ") channels last") +
                           (offset ? ", unaligned: " : ": ");
  const int64_t n = shape.total(), channels = shape.channels;
  const std::vector<S> x = test::normal<S>(n, 1), grad_y = test::normal<S>(n, 2);
  const std::vector<T> weight = test::normal<T>(channels * channels, 3), bias = test::normal<T>(channels, 4);
  const auto at = [&](int64_t sample, int64_t c, int64_t pixel) {
    return shape.by_rows ? (sample * channels + c) * shape.pixels + pixel
                         : (sample * shape.pixels + pixel) * channels + c;
  };
  // Expected values, and the sums of the absolute terms, which rounding errors are measured against.
  std::vector<double> y(n), y_size(n), grad_x(n), grad_x_size(n), grad_weight(channels * channels),
      weight_size(channels * channels), grad_bias(channels), bias_size(channels);
  for (int64_t b = 0; b < shape.samples; ++b) {
    for (int64_t p = 0; p < shape.pixels; ++p) {
      for (int64_t o = 0; o < channels; ++o) {
        const double g = test::as_double(grad_y[at(b, o, p)]);
        y[at(b, o, p)] = bias[o], y_size[at(b, o, p)] = std::fabs(bias[o]);
        grad_bias[o] += g, bias_size[o] += std::fabs(g);
        for (int64_t c = 0; c < channels; ++c) {
          const double w = weight[o * channels + c], value = test::as_double(x[at(b, c, p)]);
          y[at(b, o, p)] += w * value, y_size[at(b, o, p)] += std::fabs(w * value);
          grad_x[at(b, c, p)] += w * g, grad_x_size[at(b, c, p)] += std::fabs(w * g);
          grad_weight[o * channels + c] += g * value, weight_size[o * channels + c] += std::fabs(g * value);
        }
      }
    }
  }

  const test::Buffer<S> x_device(x, offset), grad_device(grad_y, offset);
  const test::Buffer<T> weight_device(weight), bias_device(bias);
  const double sum_epsilon = std::is_same_v<T, double> ? 1e-15 : 5e-7;
  test::Repeatable repeatable(name);
  for (int repeat = 0; repeat < 2; ++repeat) {
    test::Buffer<S> y_device(n, offset), grad_x_device(n, offset);
    test::Buffer<T> grad_weight_device(channels * channels), grad_bias_device(channels);
    test::Buffer<T> partial(hflow::cuda::conv1x1_partial_size<S>(shape));
    test::require(hflow::cuda::conv1x1_forward(x_device.data(), weight_device.data(), bias_device.data(),
                                               y_device.data(), shape, cudaStream_t{}),
                  "forward");
    test::require(hflow::cuda::conv1x1_backward(x_device.data(), weight_device.data(), grad_device.data(),
                                                grad_x_device.data(), grad_weight_device.data(),
                                                grad_bias_device.data(), partial.data(), shape, cudaStream_t{}),
                  "backward");
    partial.read();
    repeatable.expect_all("y", y_device.read(), y, y_size, epsilon + sum_epsilon);
    repeatable.expect_all("grad_x", grad_x_device.read(), grad_x, grad_x_size, epsilon + sum_epsilon);
    repeatable.expect_all("grad_weight", grad_weight_device.read(), grad_weight, weight_size, sum_epsilon);
    repeatable.expect_all("grad_bias", grad_bias_device.read(), grad_bias, bias_size, sum_epsilon);
  }
}

}  // namespace

int main() {
  test::skip_without_gpu();
  for (int channels : {1, 2, 3, 4, 5, 8, 12, 16, 24, 31, 32}) {
    for (bool by_rows : {true, false}) {
      test_case<float, float>({2, channels, 77, by_rows}, 0, "float32", 0);
      test_case<float, float>({3, channels, 16, by_rows}, 0, "float32", 0);
    }
  }
  const MixShape shapes[] = {
      {2, 3, 1100, true}, {2, 3, 1028, false}, {1, 32, 264, true}, {40, 5, 9, true}, {40, 6, 8, false}, {9, 4, 2, true},
      {70, 12, 1, false}, {1, 1, 1, false},    {0, 3, 4, true},    {2, 0, 4, false}, {2, 3, 0, true},
  };
  for (const MixShape& shape : shapes) {
    for (size_t offset : {0, 1}) {
      test_case<float, float>(shape, offset, "float32", 0);
      test_case<double, double>(shape, offset, "float64", 0);
      test_case<__nv_bfloat16, float>(shape, offset, "bfloat16", 4e-3);
      test_case<__half, float>(shape, offset, "float16", 5e-4);
    }
  }
  // Small tiles, but more of them than backward has blocks: once, since they are many.
  test_case<double, double>({540, 17, 33, true}, 0, "float64", 0);
  return test::report();
}
