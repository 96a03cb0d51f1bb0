// A coupling's transform of several elements in registers, for coupling.cuh and flow_step.cuh. Free of torch. No memory
// is touched: the scale map and the form are one branch for all elements, the same for a whole grid, so that a kernel
// need not exist nine times.
#pragma once

#include "common/coupling_geometry.h"
#include "cuda/device.cuh"

namespace hflow::cuda {

// The transform of N elements. Callers give zeros for s and t of passive ones and keep none of their results.
template <class T>
struct CouplingMath {
  ScaleMap map;
  bool shift_before;
  CouplingParameters<T> parameters;

  explicit CouplingMath(const CouplingOptions& options)
      : map(options.map),
        shift_before(shift_comes_before(options.form, options.inverse)),
        parameters(options.form, options.clamp, options.shift_clamp, options.inverse) {}

  template <int N>
  __device__ __forceinline__ void forward(const T (&x)[N], const T (&s)[N], const T (&t)[N], T (&y)[N],
                                          T (&log_scale)[N]) const {
    const CouplingParameters<T>& p = parameters;
    T scale[N];
    visit_scale_map(map, [&](auto m) {
      using Map = decltype(m);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        scale[i] = Map::scale(s[i], p.clamp, p.sign);
        log_scale[i] = p.sign * Map::log_scale(s[i], p.clamp);
      }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T shift = coupling_shift(t[i], p);
      y[i] = shift_before ? couple<true>(x[i], scale[i], shift) : couple<false>(x[i], scale[i], shift);
    }
  }

  // y once more, and the gradients; grad_x may be grad_y itself.
  template <int N>
  __device__ __forceinline__ void backward(const T (&x)[N], const T (&s)[N], const T (&t)[N], const T (&grad_y)[N],
                                           const T (&grad_log_det)[N], T (&y)[N], T (&grad_x)[N], T (&grad_s)[N],
                                           T (&grad_t)[N]) const {
    const CouplingParameters<T>& p = parameters;
    T scale[N], derivative[N];
    visit_scale_map(map, [&](auto m) {
      using Map = decltype(m);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        scale[i] = Map::scale(s[i], p.clamp, p.sign);
        derivative[i] = Map::derivative(s[i], p.clamp);
      }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T shift = coupling_shift(t[i], p), gradient = grad_y[i];
      if (shift_before) {
        y[i] = couple<true>(x[i], scale[i], shift);
        couple_gradients<true>(x[i], scale[i], derivative[i], t[i], gradient, grad_log_det[i], p, grad_x[i], grad_s[i],
                               grad_t[i]);
      } else {
        y[i] = couple<false>(x[i], scale[i], shift);
        couple_gradients<false>(x[i], scale[i], derivative[i], t[i], gradient, grad_log_det[i], p, grad_x[i], grad_s[i],
                                grad_t[i]);
      }
    }
  }
};

}  // namespace hflow::cuda
