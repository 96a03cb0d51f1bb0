// Vector width chosen at run time: a leaf is compiled for AVX-512, AVX2 and the baseline, and the processor picks.
//
// A leaf is a struct whose static `run` is always_inline and loops over plain pointers; the compiler vectorises the
// copy of it inside each target-attributed wrapper. (GCC's target_clones refuses templates, hence the wrappers.) Loops
// over several pointers say `#pragma GCC ivdep`: outputs never overlap inputs, so no run-time alias checks are needed.
#pragma once

#include <cstdlib>
#include <cstring>

#define HFLOW_LEAF __attribute__((always_inline)) static inline

#if defined(__x86_64__)
#define HFLOW_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define HFLOW_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#endif

namespace hflow {

enum class Isa { baseline, avx2, avx512 };

// HFLOW_FAST_ISA=baseline|avx2 lowers the choice, so that every compiled width can be tested on one machine.
inline Isa select_isa() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  best = avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
  if (const char* limit = std::getenv("HFLOW_FAST_ISA")) {
    if (std::strcmp(limit, "baseline") == 0) best = Isa::baseline;
    if (std::strcmp(limit, "avx2") == 0 && best == Isa::avx512) best = Isa::avx2;
  }
#endif
  return best;
}

inline Isa isa() {
  static const Isa selected = select_isa();
  return selected;
}

inline const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

#if defined(__x86_64__)
template <class Leaf, class... Args>
HFLOW_TARGET_AVX512 void run_avx512(Args... args) {
  Leaf::run(args...);
}
template <class Leaf, class... Args>
HFLOW_TARGET_AVX2 void run_avx2(Args... args) {
  Leaf::run(args...);
}
#endif

template <class Leaf, class... Args>
void run_baseline(Args... args) {
  Leaf::run(args...);
}

// Leaf::run(args...), compiled for this processor.
template <class Leaf, class... Args>
inline void run_leaf(Args... args) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return run_avx512<Leaf, Args...>(args...);
  if (isa() == Isa::avx2) return run_avx2<Leaf, Args...>(args...);
#endif
  run_baseline<Leaf, Args...>(args...);
}

// Leaf<B>::run(args...) with B, the bytes of a vector register, where a leaf needs to know.
template <template <int> class Leaf, class... Args>
inline void run_wide_leaf(Args... args) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return run_avx512<Leaf<64>, Args...>(args...);
  if (isa() == Isa::avx2) return run_avx2<Leaf<32>, Args...>(args...);
#endif
  run_baseline<Leaf<16>, Args...>(args...);
}

}  // namespace hflow
