// The scalar math of the ops, host and device: written once, used by the CPU and the CUDA kernels.
//
// A coupling multiplies by a(s) = e^λ(s) and adds a shift, both from a network's raw output. Each scale map is one
// block: the scale in the evaluated direction (sign = +1: a, −1: 1/a), its logarithm λ, and the derivative λ'(s). No
// branch on a run-time option stands in the math: compilers do not vectorise a loop around one.
#pragma once

#include "common/vector_math.h"

namespace hflow {

// ---- Hard clip to [−limit, limit]. As in torch.clamp the boundary counts as inside, and NaN stays NaN. ----

template <class T>
HFLOW_HD T clip(T x, T limit) {
  return math::clamp(x, -limit, limit);
}

template <class T>
HFLOW_HD T clip_derivative(T x, T limit) {
  return x < -limit || x > limit ? T(0) : T(1);
}

// numerator/denominator for sign = +1, its inverse for −1; both finite.
template <class T>
HFLOW_HD T signed_ratio(T numerator, T denominator, T sign) {
  const T straight = T(0.5) * (T(1) + sign), flipped = T(0.5) * (T(1) - sign);  // 0 or 1
  return (straight * numerator + flipped * denominator) / (straight * denominator + flipped * numerator);
}

// ---- Logistic function from e = e^−|v| in (0, 1], which neither overflows nor cancels. ----

template <class T>
struct Logistic {
  T v, e;

  HFLOW_HD explicit Logistic(T x) : v(x), e(math::exp(-math::abs(x))) {}
  HFLOW_HD T power(T sign) const { return signed_ratio(v < T(0) ? e : T(1), T(1) + e, sign); }  // σ or 1/σ
  HFLOW_HD T value() const { return (v < T(0) ? e : T(1)) / (T(1) + e); }
  HFLOW_HD T complement() const { return (v < T(0) ? T(1) : e) / (T(1) + e); }  // 1 − σ
  HFLOW_HD T log() const { return (v < T(0) ? v : T(0)) - math::log1p(e); }
};

// ---- Scale maps, in the order of hflow_fast/ops/coupling.py ----

enum class ScaleMap : int { none, exp, exp_clip, exp_tanh, sigmoid, sigmoid_inverse, sigmoid_floor, atan, tanh };
inline constexpr int kScaleMaps = 9;

// Additive coupling: a = 1.
struct NoScale {
  template <class T> HFLOW_HD static T scale(T, T, T) { return T(1); }
  template <class T> HFLOW_HD static T log_scale(T, T) { return T(0); }
  template <class T> HFLOW_HD static T derivative(T, T) { return T(0); }
};

// a = e^s
struct Exp {
  template <class T> HFLOW_HD static T scale(T s, T, T sign) { return math::exp(sign * s); }
  template <class T> HFLOW_HD static T log_scale(T s, T) { return s; }
  template <class T> HFLOW_HD static T derivative(T, T) { return T(1); }
};

// a = e^clip(s, ±c) (HFlow)
struct ExpClip {
  template <class T> HFLOW_HD static T scale(T s, T c, T sign) { return math::exp(sign * clip(s, c)); }
  template <class T> HFLOW_HD static T log_scale(T s, T c) { return clip(s, c); }
  template <class T> HFLOW_HD static T derivative(T s, T c) { return clip_derivative(s, c); }
};

// a = e^tanh s (Wavelet Flow)
struct ExpTanh {
  template <class T> HFLOW_HD static T scale(T s, T, T sign) { return math::exp(sign * math::tanh(s)); }
  template <class T> HFLOW_HD static T log_scale(T s, T) { return math::tanh(s); }
  template <class T> HFLOW_HD static T derivative(T s, T) { return math::tanh_derivative(s); }
};

// a = σ(s + 2) (Glow)
struct Sigmoid {
  template <class T> HFLOW_HD static T scale(T s, T, T sign) { return Logistic<T>(s + T(2)).power(sign); }
  template <class T> HFLOW_HD static T log_scale(T s, T) { return Logistic<T>(s + T(2)).log(); }
  template <class T> HFLOW_HD static T derivative(T s, T) { return Logistic<T>(s + T(2)).complement(); }
};

// a = 1/σ(s + 2) (normflows)
struct SigmoidInverse {
  template <class T> HFLOW_HD static T scale(T s, T c, T sign) { return Sigmoid::scale(s, c, -sign); }
  template <class T> HFLOW_HD static T log_scale(T s, T c) { return -Sigmoid::log_scale(s, c); }
  template <class T> HFLOW_HD static T derivative(T s, T c) { return -Sigmoid::derivative(s, c); }
};

// a = σ(s + 2) + 10⁻³ (nflows)
struct SigmoidFloor {
  template <class T> HFLOW_HD static T scale(T s, T, T sign) {
    return signed_ratio(Logistic<T>(s + T(2)).value() + T(1e-3), T(1), sign);
  }
  template <class T> HFLOW_HD static T log_scale(T s, T) { return math::log(Logistic<T>(s + T(2)).value() + T(1e-3)); }
  template <class T> HFLOW_HD static T derivative(T s, T) {
    const Logistic<T> l(s + T(2));
    return l.value() * l.complement() / (l.value() + T(1e-3));
  }
};

// a = e^(0.636·c·atan s) (FrEIA)
struct Atan {
  template <class T> HFLOW_HD static T scale(T s, T c, T sign) { return math::exp(sign * log_scale(s, c)); }
  template <class T> HFLOW_HD static T log_scale(T s, T c) { return T(0.636) * c * math::atan(s); }
  template <class T> HFLOW_HD static T derivative(T s, T c) { return T(0.636) * c / (T(1) + s * s); }
};

// a = e^(c·tanh(s/c)) (FrEIA)
struct Tanh {
  template <class T> HFLOW_HD static T scale(T s, T c, T sign) { return math::exp(sign * log_scale(s, c)); }
  template <class T> HFLOW_HD static T log_scale(T s, T c) { return c * math::tanh(s / c); }
  template <class T> HFLOW_HD static T derivative(T s, T c) { return math::tanh_derivative(s / c); }
};

// f(Map{}) for the map of that number.
template <class F>
HFLOW_HD void visit_scale_map(ScaleMap map, const F& f) {
  switch (map) {
    case ScaleMap::none: return f(NoScale{});
    case ScaleMap::exp: return f(Exp{});
    case ScaleMap::exp_clip: return f(ExpClip{});
    case ScaleMap::exp_tanh: return f(ExpTanh{});
    case ScaleMap::sigmoid: return f(Sigmoid{});
    case ScaleMap::sigmoid_inverse: return f(SigmoidInverse{});
    case ScaleMap::sigmoid_floor: return f(SigmoidFloor{});
    case ScaleMap::atan: return f(Atan{});
    case ScaleMap::tanh: return f(Tanh{});
  }
}

// ---- One element of an affine coupling ----

// Every form and direction is one of two: (x + τ)·α where the shift comes before the scale, x·α + τ where it comes
// after, with τ = ±clip(t) and α = a or 1/a.
//   forward:  scale·x + shift: after, +   (x + shift)·scale: before, +   (x − shift)·scale: before, −
//   inverse:  (x − shift)/scale: before, −   x/scale − shift: after, −   x/scale + shift: after, +
enum class Form : int { scale_shift, add_scale, subtract_scale };

inline bool shift_comes_before(Form form, bool inverse) { return (form != Form::scale_shift) != inverse; }

template <class T>
struct CouplingParameters {
  T clamp, shift_clamp;  // shift_clamp = inf: none
  T sign;                // +1 forward, −1 inverse: α = a^sign
  T shift_sign;

  CouplingParameters(Form form, double clamp, double shift_clamp, bool inverse)
      : clamp(static_cast<T>(clamp)),
        shift_clamp(static_cast<T>(shift_clamp)),
        sign(inverse ? T(-1) : T(1)),
        shift_sign((form == Form::subtract_scale) != inverse ? T(-1) : T(1)) {}
};

template <class T>
HFLOW_HD T coupling_shift(T t, const CouplingParameters<T>& p) {
  return p.shift_sign * clip(t, p.shift_clamp);
}

template <bool ShiftBefore, class T>
HFLOW_HD T couple(T x, T scale, T shift) {
  return ShiftBefore ? (x + shift) * scale : x * scale + shift;
}

// The gradients of one element, from its scale α and the derivative λ'(s) of its map.
template <bool ShiftBefore, class T>
HFLOW_HD void couple_gradients(T x, T scale, T derivative, T t, T grad_y, T grad_log_det,
                               const CouplingParameters<T>& p, T& grad_x, T& grad_s, T& grad_t) {
  grad_x = grad_y * scale;
  const T grad_log_scale = grad_x * (ShiftBefore ? x + coupling_shift(t, p) : x) + grad_log_det;
  grad_s = grad_log_scale * p.sign * derivative;
  grad_t = (ShiftBefore ? grad_x : grad_y) * p.shift_sign * clip_derivative(t, p.shift_clamp);
}

template <class Map, bool ShiftBefore, class T>
HFLOW_HD void couple(T x, T s, T t, const CouplingParameters<T>& p, T& y, T& log_scale) {
  y = couple<ShiftBefore>(x, Map::scale(s, p.clamp, p.sign), coupling_shift(t, p));
  log_scale = p.sign * Map::log_scale(s, p.clamp);
}

// y once more (free here), and the gradients.
template <class Map, bool ShiftBefore, class T>
HFLOW_HD void couple_backward(T x, T s, T t, T grad_y, T grad_log_det, const CouplingParameters<T>& p, T& y, T& grad_x,
                              T& grad_s, T& grad_t) {
  const T scale = Map::scale(s, p.clamp, p.sign);
  y = couple<ShiftBefore>(x, scale, coupling_shift(t, p));
  couple_gradients<ShiftBefore>(x, scale, Map::derivative(s, p.clamp), t, grad_y, grad_log_det, p, grad_x, grad_s,
                                grad_t);
}

}  // namespace hflow
