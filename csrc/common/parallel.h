// Work split into units fixed by the shape alone, so that results have the same bits for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace hflow {

// f(unit) for every unit, on libtorch's threads. `cost` is the elements one unit touches; tiny jobs stay on the caller.
template <class F>
inline void parallel_units(int64_t units, int64_t cost, const F& f) {
  constexpr int64_t elements_per_thread = 16384;  // below this, waking a thread costs more than it saves
  const int64_t grain = std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(cost, 1));
  if (units <= grain) {
    for (int64_t unit = 0; unit < units; ++unit) f(unit);
    return;
  }
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) f(unit);
  });
}

}  // namespace hflow
