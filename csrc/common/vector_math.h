// exp, log, log1p, tanh and atan without branches, so that the compiler vectorises loops over them. float and double.
//
// libm's scalar calls are what -O3 leaves otherwise. Errors against float64 (measured by
// python_tests/ops/test_vector_math.py): at most 3 ulp. Range reduction leaves |r| small enough for plain Taylor
// polynomials, whose coefficients a reader can check. On the device the CUDA functions are used.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define HFLOW_HD __host__ __device__ __forceinline__
#else
#define HFLOW_HD __attribute__((always_inline)) inline
#endif

namespace hflow::math {

template <class T>
struct Traits;

template <>
struct Traits<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int exp_degree = 7, log_degree = 5;     // Taylor remainders below half an ulp
  static constexpr int log1p_degree = 7, atan_degree = 9;
  static constexpr float round_magic = 12582912.0f;                        // 1.5·2²³: adding it rounds to an integer
  static constexpr float exp_low = -104.0f, exp_high = 89.0f;              // beyond: 0 and inf
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;  // n·ln2_hi is exact
};

template <>
struct Traits<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int exp_degree = 13, log_degree = 11;
  static constexpr int log1p_degree = 16, atan_degree = 20;
  static constexpr double round_magic = 6755399441055744.0;
  static constexpr double exp_low = -746.0, exp_high = 710.0;
  static constexpr double ln2_hi = 0.693147180369123816490, ln2_lo = 1.90821492927058770002e-10;
};

template <class To, class From>
HFLOW_HD To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// NaN stays NaN in x, as in torch.clamp. Each step is one instruction: a maximum or minimum that keeps its second
// operand.
template <class T>
HFLOW_HD T clamp(T x, T low, T high) {
  const T above = x < low ? low : x;
  return above > high ? high : above;
}

// c(K) + z·(c(K+1) + z·(… c(N))), unrolled at compile time.
template <int K, int N, class T, class Coefficient>
HFLOW_HD T polynomial(T z, Coefficient c) {
  if constexpr (K == N) {
    return static_cast<T>(c(K));
  } else {
    return static_cast<T>(c(K)) + z * polynomial<K + 1, N>(z, c);
  }
}

struct InverseFactorial {
  HFLOW_HD constexpr double operator()(int k) const {
    double f = 1;
    for (int i = 2; i <= k; ++i) f *= i;
    return 1 / f;
  }
};
struct InverseOdd {
  HFLOW_HD constexpr double operator()(int k) const { return 1.0 / (2 * k + 1); }
};
struct AlternatingInverseOdd {
  HFLOW_HD constexpr double operator()(int k) const { return (k % 2 ? -1.0 : 1.0) / (2 * k + 1); }
};

// 2ⁿ for |n| within the normal exponents; for others, which come with NaN, anything.
template <class T>
HFLOW_HD T power_of_two(typename Traits<T>::Int n) {
  using Unsigned = std::make_unsigned_t<typename Traits<T>::Int>;
  return bits<T>(static_cast<Unsigned>(n + Traits<T>::bias) << Traits<T>::mantissa);
}

// x = n·ln 2 + r with |r| ≤ ln 2 / 2; returns eʳ − 1.
template <class T>
HFLOW_HD T expm1_reduced(T x, typename Traits<T>::Int& n) {
  using R = Traits<T>;
  const T shifted = x * T(1.4426950408889634074) + R::round_magic;
  n = bits<typename R::Int>(shifted) - bits<typename R::Int>(R::round_magic);
  const T rounded = shifted - R::round_magic;
  const T r = (x - rounded * R::ln2_hi) - rounded * R::ln2_lo;
  return r + r * r * polynomial<2, R::exp_degree>(r, InverseFactorial{});
}

template <class T>
HFLOW_HD T exp(T x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  using R = Traits<T>;
  typename R::Int n;
  const T p = expm1_reduced(clamp(x, R::exp_low, R::exp_high), n);
  // 2ⁿ in two factors: e^x may be subnormal, or overflow only in the last step.
  const typename R::Int half = n >> 1;
  return (T(1) + p) * power_of_two<T>(half) * power_of_two<T>(n - half);
#endif
}

// eˣ − 1 for x ≤ 0, accurate near zero.
template <class T>
HFLOW_HD T expm1_nonpositive(T x) {
#if defined(__CUDA_ARCH__)
  return ::expm1(x);
#else
  using R = Traits<T>;
  typename R::Int n;
  const T low = T(-2) * R::mantissa;  // e^low is far below half an ulp of 1
  const T p = expm1_reduced(x < low ? low : x, n);
  const T scale = power_of_two<T>(n);
  return p * scale + (scale - T(1));
#endif
}

// Natural logarithm of normal positive x; +inf and NaN are kept, 0 gives −inf, negative x gives NaN. Subnormals count
// as 0.
template <class T>
HFLOW_HD T log(T x) {
#if defined(__CUDA_ARCH__)
  return ::log(x);
#else
  using R = Traits<T>;
  using Int = typename R::Int;
  // x = 2ᵉ·m with m in [√½, √2): subtracting the bits of √½ makes the exponent field count from there.
  const Int offset = bits<Int>(x) - bits<Int>(T(0.70710678118654752440));
  const Int e = offset >> R::mantissa;
  const T m = bits<T>(bits<Int>(x) - static_cast<Int>(static_cast<std::make_unsigned_t<Int> >(e) << R::mantissa));
  const T d = m - T(1);
  const T f = d / (d + T(2));  // log m = 2·atanh f
  const T z = f * f;
  const T tail = z * polynomial<1, R::log_degree>(z, InverseOdd{});
  // 2f = d − f·d exactly: keeping d outside preserves the last bits for m near 1.
  const T n = bits<T>(bits<Int>(R::round_magic) + e) - R::round_magic;  // AVX2 cannot convert 64-bit integers
  T value = n * R::ln2_hi + (d - (f * d - (T(2) * f * tail + n * R::ln2_lo)));
  const T tiny = bits<T>(Int(1) << R::mantissa);
  value = x < tiny ? (x < T(0) ? T(NAN) : -T(INFINITY)) : value;
  return x <= bits<T>((Int(2 * R::bias + 1) << R::mantissa) - 1) ? value : x;  // above the largest finite value, or NaN
#endif
}

// log(1 + x) for 0 ≤ x ≤ 1: 2·atanh(x / (2 + x)), whose argument is at most 1/3.
template <class T>
HFLOW_HD T log1p(T x) {
#if defined(__CUDA_ARCH__)
  return ::log1p(x);
#else
  const T f = x / (x + T(2));
  const T z = f * f;
  // 2f = x − f·x exactly: keeping x outside preserves its last bits.
  return x - f * (x - T(2) * (z * polynomial<1, Traits<T>::log1p_degree>(z, InverseOdd{})));
#endif
}

template <class T>
HFLOW_HD T abs(T x) {
  return std::fabs(x);
}

template <class T>
HFLOW_HD T tanh(T x) {
#if defined(__CUDA_ARCH__)
  return ::tanh(x);
#else
  const T em = expm1_nonpositive(T(-2) * abs(x));
  const T t = em / (em + T(2));
  return x < T(0) ? t : -t;
#endif
}

// 1 − tanh² x, without cancellation.
template <class T>
HFLOW_HD T tanh_derivative(T x) {
  const T e = exp(T(-2) * abs(x)), q = T(1) + e;
  return T(4) * e / (q * q);
}

template <class T>
HFLOW_HD T atan(T x) {
#if defined(__CUDA_ARCH__)
  return ::atan(x);
#else
  // |x| is brought below tan(π/8): atan x = π/2 + atan(−1/x) = π/4 + atan((x − 1)/(x + 1)).
  const T a = abs(x);
  const bool large = a > T(2.41421356237309504880), middle = a > T(0.41421356237309504880);
  const T numerator = large ? T(-1) : (middle ? a - T(1) : a);
  const T denominator = large ? a : (middle ? a + T(1) : T(1));
  const T base = large ? T(1.57079632679489661923) : (middle ? T(0.78539816339744830962) : T(0));
  const T r = numerator / denominator;
  const T z = r * r;
  const T value = base + (r + r * z * polynomial<1, Traits<T>::atan_degree>(z, AlternatingInverseOdd{}));
  return x < T(0) ? -value : value;
#endif
}

}  // namespace hflow::math
