// The two half types: storage, and conversion from and to float, rounding to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

// A float format of 16 bits: one sign bit, `Mantissa` bits of mantissa, the rest exponent.
template <int Mantissa>
class Half {
 public:
  Half() = default;
  explicit Half(float value) {
    constexpr int bias = (1 << (14 - Mantissa)) - 1, largest = 2 * bias + 1;  // `largest` exponent: Inf and NaN
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) {
      bits_ = 0x7fff;
    } else if (value == 0 || std::isinf(value)) {
      bits_ = static_cast<uint16_t>(sign | (value == 0 ? 0 : largest << Mantissa));
    } else {
      int exponent;
      std::frexp(value, &exponent);
      const int field = std::max(exponent - 1 + bias, 1);  // 1 also for subnormal results, which have no leading one
      // In units of the last place; adding the field's units carries into the exponent where rounding overflows.
      const double units = std::nearbyint(std::ldexp(std::fabs(static_cast<double>(value)), Mantissa - (field - bias)));
      const int64_t magnitude = static_cast<int64_t>(units) + (static_cast<int64_t>(field - 1) << Mantissa);
      bits_ = static_cast<uint16_t>(sign | std::min<int64_t>(magnitude, largest << Mantissa));
    }
  }
  explicit operator float() const {
    constexpr int bias = (1 << (14 - Mantissa)) - 1;
    const int exponent = (bits_ & 0x7fff) >> Mantissa, mantissa = bits_ & ((1 << Mantissa) - 1);
    const float sign = bits_ & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 2 * bias + 1) return mantissa ? NAN : sign * INFINITY;
    const int whole = exponent ? mantissa | 1 << Mantissa : mantissa;
    return sign * std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - bias - Mantissa);
  }

 private:
  uint16_t bits_;
};

}  // namespace emulator
