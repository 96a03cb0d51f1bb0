// Division by a number that is known before the launch: a multiplication and a shift. Host and device.
#pragma once

#include "common/vector_math.h"

namespace hflow {

// n / divisor for 0 ≤ n < 2⁶³. With 2ˡ the power of two from the divisor d on, m = ⌈2⁶³⁺ˡ/d⌉ fits in 64 bits, and n·m
// exceeds 2⁶³⁺ˡ·n/d by less than n·2ˡ/d < 2⁶³⁺ˡ/d, too little to reach the next multiple of 2⁶³⁺ˡ.
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : value_(divisor) {
    if (divisor <= 1) return;
    while ((int64_t{1} << (shift_ + 1)) < divisor) ++shift_;
    const unsigned __int128 power = static_cast<unsigned __int128>(1) << (64 + shift_);
    multiplier_ = static_cast<uint64_t>((power + static_cast<uint64_t>(divisor) - 1) / static_cast<uint64_t>(divisor));
  }

  HFLOW_HD int64_t value() const { return value_; }

  HFLOW_HD int64_t divide(int64_t n) const {
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(static_cast<uint64_t>(n), multiplier_);
#else
    const uint64_t high =
        static_cast<uint64_t>(static_cast<unsigned __int128>(static_cast<uint64_t>(n)) * multiplier_ >> 64);
#endif
    return multiplier_ == 0 ? n : static_cast<int64_t>(high >> shift_);
  }

 private:
  int64_t value_;
  uint64_t multiplier_ = 0;  // 0: the divisor is 1
  int shift_ = 0;            // l − 1
};

}  // namespace hflow
