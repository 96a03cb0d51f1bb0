// Random input, and the comparison of outputs, for the tests of the torch-free kernels.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"

namespace test {

template <class S>
double as_double(S value) {
  if constexpr (std::is_same_v<S, double>) return value;
  return static_cast<double>(static_cast<float>(value));
}

template <class S>
std::vector<S> normal(int64_t n, unsigned seed, double mean = 0) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution(mean);
  std::vector<S> values(n);
  for (S& value : values)
    value = static_cast<S>(static_cast<std::conditional_t<std::is_same_v<S, double>, double, float>>(
        distribution(generator)));
  return values;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Outputs of one case run several times: the first run's are compared with what is expected, the others' bits with the
// first run's.
class Repeatable {
 public:
  explicit Repeatable(const std::string& name) : name_(name) {}

  // |got − expected| ≤ epsilon · size, where `size` is that of the terms which add up to the value.
  template <class S>
  void expect_all(const std::string& what, const std::vector<S>& got, const std::vector<double>& expected,
                  const std::vector<double>& size, double epsilon) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(got.data());
    const std::vector<unsigned char> bits(bytes, bytes + got.size() * sizeof(S));
    const auto [first, is_new] = first_.try_emplace(what, bits);
    if (!is_new) {
      if (first->second == bits) return;
      if (++failures <= 20) std::printf("FAILED %s%s: a second run gave other bits\n", name_.c_str(), what.c_str());
      return;
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      const double scale = size[i] > 0 ? size[i] : 1;
      if (!close(as_double(got[i]) / scale, expected[i] / scale, epsilon))
        expect_close(name_ + what + "[" + std::to_string(i) + "]", as_double(got[i]) / scale, expected[i] / scale,
                     epsilon);
    }
  }

 private:
  std::string name_;
  std::map<std::string, std::vector<unsigned char>> first_;
};

}  // namespace test
