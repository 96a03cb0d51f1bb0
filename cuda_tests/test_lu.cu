// The kernel of csrc/cuda/lu.cuh against elimination in long double on the host: every size, dtypes, several stacks in
// one launch and more than a launch takes, pivots of zero, bad scaling, singular and not finite matrices; the same bits
// in a second run.
#include "cuda/lu.cuh"

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>

#include "check.h"
#include "device.h"
#include "values.h"

namespace {

using hflow::cuda::LuStack;
using hflow::cuda::LuType;
using test::as_double;

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Expected {
  long double log_abs_det = 0;
  std::vector<long double> inverse;
};

// Gauss–Jordan on (A | 1) with complete pivoting.
Expected invert(std::vector<long double> a, int n) {
  Expected expected;
  std::vector<long double> b(n * n);
  std::vector<int> column_of(n), row_of(n);
  std::vector<bool> row_used(n), column_used(n);
  for (int i = 0; i < n; ++i) b[i * n + i] = 1;
  for (int step = 0; step < n; ++step) {
    int p = -1, q = -1;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j)
        if (!row_used[i] && !column_used[j] && (p < 0 || std::fabs(a[i * n + j]) > std::fabs(a[p * n + q])))
          p = i, q = j;
    row_used[p] = column_used[q] = true;
    row_of[q] = p;
    const long double pivot = a[p * n + q];
    expected.log_abs_det += std::log(std::fabs(pivot));
    for (int j = 0; j < n; ++j) a[p * n + j] /= pivot, b[p * n + j] /= pivot;
    for (int i = 0; i < n; ++i) {
      if (i == p) continue;
      const long double factor = a[i * n + q];
      for (int j = 0; j < n; ++j) a[i * n + j] -= factor * a[p * n + j], b[i * n + j] -= factor * b[p * n + j];
    }
  }
  expected.inverse.resize(n * n);
  for (int q = 0; q < n; ++q)
    for (int j = 0; j < n; ++j) expected.inverse[q * n + j] = b[row_of[q] * n + j];
  return expected;
}

template <class S>
LuType type_of() {
  if (std::is_same_v<S, double>) return LuType::float64;
  if (std::is_same_v<S, __nv_bfloat16>) return LuType::bfloat16;
  return std::is_same_v<S, __half> ? LuType::float16 : LuType::float32;
}

// Random matrices of which every third has a leading zero, and the memory of their results.
template <class S>
struct Stack {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  int64_t count;
  int n;
  std::vector<S> weight;
  test::Buffer<S> weight_device;
  test::Buffer<T> log_abs_det, inverse;

  static std::vector<S> random(int64_t count, int n) {
    std::mt19937 generator(static_cast<unsigned>(100 * count + n));
    std::normal_distribution<double> normal;
    std::vector<S> values(count * n * n);
    for (int64_t e = 0; e < count * n * n; ++e) {
      const int64_t diagonal = e % (n * n) % (n + 1) == 0;
      values[e] = static_cast<S>(static_cast<T>(normal(generator) + 2.0 * static_cast<double>(diagonal)));
    }
    for (int64_t m = 0; n > 1 && m < count; m += 3) values[m * n * n] = static_cast<S>(T(0));
    return values;
  }

  Stack(int64_t count, int n) : Stack(count, n, random(count, n)) {}
  Stack(int64_t count, int n, std::vector<S> values)
      : count(count), n(n), weight(values), weight_device(values), log_abs_det(count), inverse(count * n * n) {}

  LuStack arguments() const {
    return {weight_device.data(), log_abs_det.data(), inverse.data(), count, n, type_of<S>()};
  }

  void check(const std::string& name) const {
    const double epsilon = std::is_same_v<T, double> ? 4e-16 : 1e-7;
    const std::vector<T> got_log = log_abs_det.read(), got_inverse = inverse.read();
    for (int64_t m = 0; m < count; ++m) {
      std::vector<long double> values;
      for (int e = 0; e < n * n; ++e) values.push_back(as_double(weight[m * n * n + e]));
      const Expected expected = invert(values, n);
      // Rounding in float64 is amplified by the condition number, that of the result is not.
      double norm = 0, inverse_norm = 0;
      for (int e = 0; e < n * n; ++e) {
        norm = std::fmax(norm, std::fabs(static_cast<double>(values[e])));
        inverse_norm = std::fmax(inverse_norm, std::fabs(static_cast<double>(expected.inverse[e])));
      }
      const double tolerance = epsilon + 2e-16 * n * n * norm * inverse_norm;
      const std::string at = name + std::to_string(n) + " × " + std::to_string(n) + ", matrix " + std::to_string(m);
      test::expect_close(at + ": log_abs_det", double(got_log[m]), double(expected.log_abs_det), 4 * tolerance);
      for (int e = 0; e < n * n; ++e)
        test::expect_close(at + ": inverse", double(got_inverse[m * n * n + e]) / inverse_norm,
                           static_cast<double>(expected.inverse[e]) / inverse_norm, tolerance);
    }
  }
};

void factor(const std::vector<LuStack>& stacks) {
  test::require(hflow::cuda::lu_factor(stacks.data(), static_cast<int64_t>(stacks.size()), cudaStream_t{}), "lu");
}

template <class S>
void test_sizes(const char* type) {
  for (int n : {1, 2, 3, 4, 5, 7, 8, 9, 12, 24, 31, 32, 33, 48, 64}) {
    const Stack<S> stack(n <= 8 ? 37 : 2, n);
    factor({stack.arguments()});
    stack.check(std::string(type) + " ");
  }
}

void test_stacks() {
  const Stack<float> a(4, 3), b(8, 4), c(8, 8), none(0, 5), large(1, 40);
  const Stack<double> d(3, 12);
  const Stack<__nv_bfloat16> e(2, 6);
  const Stack<float> empty(2, 0);
  factor({none.arguments(), a.arguments(), b.arguments(), none.arguments(), c.arguments(), large.arguments(),
          d.arguments(), e.arguments(), empty.arguments()});
  a.check("stacks "), b.check("stacks "), c.check("stacks "), large.check("stacks "), d.check("stacks ");
  e.check("stacks ");
  for (float log_det : empty.log_abs_det.read()) test::expect_close("0 × 0", log_det, 0, 0);
  factor({});
  factor({none.arguments()});

  std::vector<LuStack> many;
  std::vector<std::unique_ptr<Stack<float>>> stacks;
  for (int s = 0; s < 2 * hflow::cuda::kLuStacks + 3; ++s) {
    stacks.push_back(std::make_unique<Stack<float>>(1 + s % 3, 1 + s % 9));
    many.push_back(stacks.back()->arguments());
  }
  factor(many);
  for (const auto& stack : stacks) stack->check("many stacks ");
}

// One matrix among good ones: it alone is to have the results of a singular or a not finite one.
void expect_undefined(const std::string& name, int n, const std::vector<double>& bad, double log_det) {
  std::vector<double> values = Stack<double>::random(3, n);
  std::copy(bad.begin(), bad.end(), values.begin() + n * n);
  const Stack<double> stack(3, n, values);
  factor({stack.arguments()});
  const std::vector<double> logs = stack.log_abs_det.read(), inverse = stack.inverse.read();
  for (int m = 0; m < 3; ++m) {
    const std::string at = name + ", n = " + std::to_string(n) + ", matrix " + std::to_string(m) + ": ";
    if (m == 1) test::expect_close(at + "log_abs_det", logs[m], log_det, 0);
    if (m != 1 && !std::isfinite(logs[m])) ++test::failures, std::printf("FAILED %sfinite\n", at.c_str());
    for (int e = 0; e < n * n; ++e)
      if (std::isnan(inverse[m * n * n + e]) != (m == 1)) ++test::failures, std::printf("FAILED %sNaN\n", at.c_str());
  }
}

void test_undefined() {
  std::mt19937 generator(7);
  std::uniform_int_distribution<int> digit(-5, 5);
  for (int n : {2, 3, 8, 13, 64}) {
    std::vector<double> good = Stack<double>::random(1, n), bad = good;
    for (int i = 0; i < n; ++i) bad[i * n + n - 1] = 0;
    expect_undefined("a column of zeros", n, bad, -kInf);
    bad = good;
    for (int j = 0; j < n; ++j) bad[j] = 0;
    expect_undefined("a row of zeros", n, bad, -kInf);
    expect_undefined("zeros", n, std::vector<double>(n * n), -kInf);
    if (n > 2) {
      for (double& value : bad) value = digit(generator);
      for (int i = 0; i < n; ++i) {
        bad[i * n + n - 1] = 0;
        for (int j = 0; j + 1 < n; ++j) bad[i * n + n - 1] += bad[i * n + j];
      }
      expect_undefined("a column that is the sum of the others", n, bad, -kInf);
    }
    for (double value : {std::nan(""), kInf, -kInf}) {
      for (int at : {0, n - 1, n * n - 1}) {
        bad = good;
        bad[at] = value;
        expect_undefined("not finite", n, bad, std::nan(""));
      }
    }
  }
}

void test_scaling() {
  for (int n : {4, 10}) {
    std::vector<double> values = Stack<double>::random(2, n);
    for (int e = 0; e < 2 * n * n; ++e)
      values[e] = std::ldexp(values[e], 90 * (e / n % n) / n - 110 * (e % n) / n);
    const Stack<double> scaled(2, n, values);
    const Stack<double> plain(2, n);
    factor({scaled.arguments(), plain.arguments()});
    const std::vector<double> got = scaled.inverse.read(), expected = plain.inverse.read();
    for (int e = 0; e < 2 * n * n; ++e) {
      const int row = e / n % n, column = e % n;
      test::expect_close("scaled rows and columns", std::ldexp(got[e], 90 * column / n - 110 * row / n), expected[e],
                         1e-11);
    }
  }
}

void test_same_bits() {
  for (int n : {6, 20}) {
    const Stack<float> one(5, n), two(5, n);
    factor({one.arguments()});
    factor({one.arguments(), two.arguments()});
    const std::vector<float> a = one.inverse.read(), b = two.inverse.read();
    if (std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) != 0)
      ++test::failures, std::printf("FAILED: another launch gave other bits, n = %d\n", n);
  }
}

}  // namespace

int main() {
  test::skip_without_gpu();
  test_sizes<float>("float32");
  test_sizes<double>("float64");
  test_sizes<__nv_bfloat16>("bfloat16");
  test_sizes<__half>("float16");
  test_stacks();
  test_undefined();
  test_scaling();
  test_same_bits();
  return test::report();
}
