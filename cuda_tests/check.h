// The little that the C++ tests share: comparing numbers, and counting what failed.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

namespace test {

inline int failures = 0;

// |got − expected| ≤ tolerance · max(1, |expected|); equal infinities and two NaN are close.
inline bool close(double got, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected) || std::isinf(got)) return got == expected;
  return std::fabs(got - expected) <= tolerance * std::fmax(1.0, std::fabs(expected));
}

inline void expect_close(const std::string& what, double got, double expected, double tolerance) {
  if (close(got, expected, tolerance)) return;
  if (++failures <= 20) std::printf("FAILED %s: got %.17g, expected %.17g\n", what.c_str(), got, expected);
}

// The exit status of main.
inline int report() {
  if (failures) std::printf("%d failed\n", failures);
  return failures ? 1 : 0;
}

}  // namespace test
