// The kernels of csrc/cuda/instance_norm.cuh against double on the host: dtypes, planes of both sizes and pixels, odd
// sizes, unaligned memory, a large mean, empty inputs; the same bits in a second run.
#include "cuda/instance_norm.cuh"

#include <string>
#include <type_traits>

#include "check.h"
#include "device.h"
#include "values.h"

namespace {

using hflow::cuda::InstanceNormShape;
using test::as_double;
using test::normal;
using test::same_bits;

template <class S, class T>
void test_case(const InstanceNormShape& shape, size_t offset, double mean, double epsilon, const std::string& name) {
  const double added = 0.01;
  const int64_t total = shape.total();
  const std::vector<S> x = normal<S>(total, 1, mean), grad_y = normal<S>(total, 2, 0.5);
  std::vector<double> y(total), grad_x(total);
  for (int64_t b = 0; b < shape.count; ++b) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      const auto at = [&](int64_t i) { return (b * shape.n + i) * shape.channels + c; };
      double average = 0, variance = 0, grad_average = 0, product = 0;
      for (int64_t i = 0; i < shape.n; ++i) average += as_double(x[at(i)]) / shape.n;
      for (int64_t i = 0; i < shape.n; ++i) variance += std::pow(as_double(x[at(i)]) - average, 2) / (shape.n - 1);
      const double deviation = std::sqrt(variance + added);
      for (int64_t i = 0; i < shape.n; ++i) {
        y[at(i)] = (as_double(x[at(i)]) - average) / deviation;
        grad_average += as_double(grad_y[at(i)]) / shape.n;
        product += as_double(grad_y[at(i)]) * y[at(i)];
      }
      for (int64_t i = 0; i < shape.n; ++i)
        grad_x[at(i)] = (as_double(grad_y[at(i)]) - grad_average - y[at(i)] * product / (shape.n - 1)) / deviation;
    }
  }

  const test::Buffer<S> x_device(x, offset), grad_device(grad_y, offset);
  std::vector<S> first_y, first_grad_x;
  for (int repeat = 0; repeat < 2; ++repeat) {
    test::Buffer<S> y_device(total, offset), grad_x_device(total, offset);
    test::require(hflow::cuda::instance_norm_forward(x_device.data(), y_device.data(), static_cast<T>(added), shape,
                                                     cudaStream_t{}),
                  "forward");
    test::require(hflow::cuda::instance_norm_backward(x_device.data(), grad_device.data(), grad_x_device.data(),
                                                      static_cast<T>(added), shape, cudaStream_t{}),
                  "backward");
    const std::vector<S> got_y = y_device.read(), got_grad_x = grad_x_device.read();
    if (repeat == 1) {
      if (!same_bits(got_y, first_y) || !same_bits(got_grad_x, first_grad_x)) {
        ++test::failures;
        std::printf("FAILED %s: a second run gave other bits\n", name.c_str());
      }
      continue;
    }
    first_y = got_y, first_grad_x = got_grad_x;
    for (int64_t e = 0; e < total; ++e) {
      test::expect_close(name + "y", as_double(got_y[e]), y[e], epsilon);
      test::expect_close(name + "grad_x", as_double(got_grad_x[e]), grad_x[e], epsilon);
    }
  }
}

template <class S, class T>
void test_type(const char* type, double epsilon) {
  const InstanceNormShape shapes[] = {
      {3, 64, 1, false}, {2, 49, 1, false},  {2, 2, 1, false},   {2, 1100, 1, false}, {1, 4099, 1, false},
      {2, 64, 16, true}, {2, 150, 40, true}, {1, 300, 20, true}, {2, 9, 5, true},     {1, 2, 2, true},
      {0, 4, 1, false},  {2, 0, 1, false},   {2, 4, 0, true},
  };
  for (const InstanceNormShape& shape : shapes) {
    for (size_t offset : {0, 1}) {
      const std::string name = std::string(type) + " (" + std::to_string(shape.count) + ", " +
                               std::to_string(shape.n) + ", " + std::to_string(shape.channels) +
                               (shape.interleaved ? ") pixels" : ") planes") + (offset ? ", unaligned: " : ": ");
      test_case<S, T>(shape, offset, 0.3, epsilon, name);
    }
  }
}

}  // namespace

int main() {
  test::skip_without_gpu();
  // 1000 is exact in float; sums over it are not.
  test_case<float, float>({2, 1100, 1, false}, 0, 1000, 4e-6, "float32 planes with a large mean: ");
  test_case<float, float>({2, 150, 8, true}, 0, 1000, 4e-6, "float32 pixels with a large mean: ");
  test_type<float, float>("float32", 3e-6);
  test_type<double, double>("float64", 1e-14);
  test_type<__nv_bfloat16, float>("bfloat16", 1.6e-2);
  test_type<__half, float>("float16", 2e-3);
  return test::report();
}
