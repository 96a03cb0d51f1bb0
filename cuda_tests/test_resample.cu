// The kernels of csrc/cuda/resample.cuh against double on the host, where the filter is a matrix built from its
// definition and the adjoint its transpose: dtypes, both memory formats, vectors and single elements.
#include "cuda/resample.cuh"

#include <string>
#include <type_traits>

#include "check.h"
#include "device.h"
#include "values.h"

namespace {

using hflow::cuda::ResampleShape;
using test::as_double;
using test::normal;
using Matrix = std::vector<std::vector<double>>;

// Row o holds the weights of result o over the elements of an axis, of n on the smaller side.
Matrix filter(int64_t n, bool up, bool adjoint) {
  const int64_t size = up ? n : 2 * n, results = up ? 2 * n : n;
  Matrix forward(results, std::vector<double>(size));
  const auto add = [&](int64_t o, int64_t i, double weight) {
    const int64_t before = up ? 0 : 1;
    forward[o][i < 0 ? before : i >= size ? size - 2 : i] += weight;
  };
  for (int64_t o = 0; o < results; ++o) {
    if (up) {
      add(o, o / 2, 0.75);
      add(o, o % 2 ? o / 2 + 1 : o / 2 - 1, 0.25);
    } else {
      const double weights[] = {0.125, 0.375, 0.375, 0.125};
      for (int k = 0; k < 4; ++k) add(o, 2 * o - 1 + k, weights[k]);
    }
  }
  if (!adjoint) return forward;
  Matrix transposed(size, std::vector<double>(results));
  for (int64_t o = 0; o < results; ++o)
    for (int64_t i = 0; i < size; ++i) transposed[i][o] = forward[o][i];
  return transposed;
}

template <class S, class T>
void test_case(const ResampleShape& shape, size_t offset, double epsilon, const std::string& name) {
  const Matrix down = filter(shape.height, shape.up, shape.adjoint), across = filter(shape.width, shape.up, shape.adjoint);
  const int64_t rows = down.size(), columns = across.size(), lanes = shape.lanes;
  const int64_t in_rows = down[0].size(), in_columns = across[0].size();
  const std::vector<S> x = normal<S>(shape.images * in_rows * in_columns * lanes, 1);
  const test::Buffer<S> x_device(x, offset);
  test::Buffer<S> y_device(shape.images * rows * columns * lanes, offset);
  test::require(hflow::cuda::resample<S, T>(x_device.data(), y_device.data(), shape, cudaStream_t{}), "resample");
  const std::vector<S> y = y_device.read();
  for (int64_t image = 0; image < shape.images; ++image) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          double expected = 0;
          for (int64_t i = 0; i < in_rows; ++i)
            for (int64_t j = 0; j < in_columns; ++j)
              if (down[r][i] != 0 && across[c][j] != 0)
                expected += down[r][i] * across[c][j] *
                            as_double(x[((image * in_rows + i) * in_columns + j) * lanes + lane]);
          const double got = as_double(y[((image * rows + r) * columns + c) * lanes + lane]);
          test::expect_close(name, got, expected, 4 * epsilon);
        }
      }
    }
  }
}

template <class S, class T>
void test_type(const char* type, double epsilon) {
  // images, height, width (of the smaller side), lanes
  const int64_t shapes[][4] = {{3, 3, 8, 1}, {2, 2, 16, 1}, {2, 5, 3, 1}, {2, 3, 2, 8}, {1, 2, 3, 16}, {2, 2, 3, 3},
                               {1, 2, 2, 1}, {0, 2, 8, 1}, {2, 2, 2, 0}};
  for (const auto& s : shapes) {
    for (int mode = 0; mode < 4; ++mode) {
      for (size_t offset : {0, 1}) {
        const ResampleShape shape{s[0], s[1], s[2], s[3], mode % 2 == 1, mode / 2 == 1};
        std::string name = std::string(type) + " (";
        for (int64_t size : s) name += std::to_string(size) + ", ";
        test_case<S, T>(shape, offset, epsilon,
                        name + (shape.up ? "up" : "down") + (shape.adjoint ? ", adjoint" : "") +
                            (offset ? ", unaligned)" : ")"));
      }
    }
  }
  // The smallest image that is halved, and its adjoint.
  test_case<S, T>({2, 1, 1, 1, false, false}, 0, epsilon, std::string(type) + " one pixel down");
  test_case<S, T>({2, 1, 1, 1, false, true}, 0, epsilon, std::string(type) + " one pixel down, adjoint");
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
