// The kernels of csrc/cuda/bias_act.cuh against double on the host: activations, with and without bias and residual,
// dtypes, both memory formats, odd sizes, unaligned memory, empty inputs; the same bits in a second run.
#include "cuda/bias_act.cuh"

#include <string>
#include <type_traits>

#include "check.h"
#include "device.h"
#include "values.h"

namespace {

using hflow::Activation;
using hflow::cuda::ChannelShape;
using test::as_double;
using test::normal;
using test::same_bits;

struct Case {
  ChannelShape shape;
  Activation activation;
  bool biased, merges;
  size_t offset;  // elements by which tensors miss a 16-byte boundary
  std::string name;
};

template <class S, class T>
void test_case(const Case& c, double epsilon) {
  const ChannelShape& shape = c.shape;
  const T slope = T(0.25), gain = T(0.625);
  const int64_t n = shape.total(), channels = shape.channels;
  const auto channel_of = [&](int64_t e) { return shape.by_rows ? e / shape.pixels % channels : e % channels; };
  const std::vector<S> x = normal<S>(n, 1), residual = normal<S>(n, 2), grad_y = normal<S>(n, 3);
  const std::vector<T> bias = normal<T>(channels, 4);

  std::vector<double> y(n), grad_x(n), grad_residual(n), grad_bias(channels), magnitude(channels);
  for (int64_t e = 0; e < n; ++e) {
    const double v = as_double(x[e]) + (c.biased ? double(bias[channel_of(e)]) : 0);
    double value = v, derivative = 1;
    if (c.activation == Activation::leaky_relu && v <= 0) value = 0.25 * v, derivative = 0.25;
    if (c.activation == Activation::tanh) value = std::tanh(v), derivative = 1 - value * value;
    y[e] = 0.625 * (value + (c.merges ? as_double(residual[e]) : 0));
    grad_residual[e] = 0.625 * as_double(grad_y[e]);
    grad_x[e] = grad_residual[e] * derivative;
    grad_bias[channel_of(e)] += grad_x[e];
    magnitude[channel_of(e)] += std::fabs(grad_x[e]);
  }

  const test::Buffer<S> x_device(x, c.offset), residual_device(residual, c.offset), grad_device(grad_y, c.offset);
  const test::Buffer<T> bias_device(bias);
  const hflow::cuda::BiasAct<S, T> op{x_device.data(), c.biased ? bias_device.data() : nullptr,
                                      c.merges ? residual_device.data() : nullptr, c.activation, slope, gain};
  std::vector<S> first_y, first_grad_x;
  std::vector<T> first_bias;
  for (int repeat = 0; repeat < 2; ++repeat) {
    test::Buffer<S> y_device(n, c.offset), grad_x_device(n, c.offset), grad_residual_device(n, c.offset);
    test::Buffer<T> grad_bias_device(channels);
    test::Buffer<T> partial(hflow::cuda::channel_sums_size<S>(shape, c.offset == 0));
    test::require(hflow::cuda::bias_act_forward(op, y_device.data(), shape, cudaStream_t{}), "forward");
    test::require(hflow::cuda::bias_act_backward(op, grad_device.data(), grad_x_device.data(),
                                                 c.merges ? grad_residual_device.data() : nullptr,
                                                 c.biased ? grad_bias_device.data() : nullptr, partial.data(), shape,
                                                 cudaStream_t{}),
                  "backward");
    const std::vector<S> got_y = y_device.read(), got_grad_x = grad_x_device.read(),
                         got_residual = grad_residual_device.read();
    const std::vector<T> got_bias = grad_bias_device.read();
    partial.read();
    if (repeat == 1) {
      if (!same_bits(got_y, first_y) || !same_bits(got_grad_x, first_grad_x) || !same_bits(got_bias, first_bias)) {
        ++test::failures;
        std::printf("FAILED %s: a second run gave other bits\n", c.name.c_str());
      }
      continue;
    }
    first_y = got_y, first_grad_x = got_grad_x, first_bias = got_bias;
    for (int64_t e = 0; e < n; ++e) {
      test::expect_close(c.name + "y", as_double(got_y[e]), y[e], 4 * epsilon);
      test::expect_close(c.name + "grad_x", as_double(got_grad_x[e]), grad_x[e], 4 * epsilon);
      if (c.merges)
        test::expect_close(c.name + "grad_residual", as_double(got_residual[e]), grad_residual[e], 4 * epsilon);
    }
    const double sum_epsilon = std::is_same_v<T, double> ? 1e-14 : 1e-6;
    for (int64_t k = 0; c.biased && k < channels; ++k)
      test::expect_close(c.name + "grad_bias", double(got_bias[k]) / (1 + magnitude[k]),
                         grad_bias[k] / (1 + magnitude[k]), sum_epsilon);
  }
}

template <class S, class T>
void test_type(const char* type, double epsilon) {
  const ChannelShape shapes[] = {{2, 3, 64, true},   {3, 5, 49, true},   {2, 1, 3, true}, {2, 3, 64, false},
                                 {3, 37, 5, false}, {1, 1, 1, false},   {0, 3, 4, true}, {2, 0, 4, true},
                                 {2, 3, 0, false}};
  for (const ChannelShape& shape : shapes) {
    for (int options = 0; options < 12; ++options) {
      // Every activation with every pair of options; the unaligned ones take turns.
      const Activation activation = static_cast<Activation>(options % 3);
      const bool biased = options / 3 % 2 == 1, merges = options / 6 == 1;
      for (size_t offset : {0, 1}) {
        if (offset == 1 && options % 4 != 0) continue;
        const std::string name = std::string(type) + " (" + std::to_string(shape.samples) + ", " +
                                 std::to_string(shape.channels) + ", " + std::to_string(shape.pixels) +
                                 (shape.by_rows ? ") rows, activation " : ") channels last, activation ") +
                                 std::to_string(options % 3) + (biased ? ", bias" : "") +
                                 (merges ? ", residual" : "") + (offset ? ", unaligned: " : ": ");
        test_case<S, T>({shape, activation, biased, merges, offset, name}, epsilon);
      }
    }
  }
}

}  // namespace

int main() {
  test::skip_without_gpu();
  test_type<float, float>("float32", 1.5e-7);
  test_type<double, double>("float64", 5e-16);
  test_type<__nv_bfloat16, float>("bfloat16", 4e-3);
  test_type<__half, float>("float16", 5e-4);
  return test::report();
}
