// The scalar math of the ops inside networks (resample, instance_norm, bias_act), host and device: written once, used by
// the CPU and the CUDA kernels. That of the flow itself is in formulas.h.
#pragma once

#include "common/vector_math.h"

namespace hflow {

// ---- resample: the binomial filter [1, 3, 3, 1] along one axis, the same on every axis ----

// Halving reads four neighbours, doubling a near and a far one. Each is the other's adjoint but for the edges and for
// the weight: 1/8 where an average halves the size, 1/4 where it doubles it, and the same in the adjoint.
template <class T>
HFLOW_HD T resample_weight(bool up) {
  return up ? T(0.25) : T(0.125);
}

template <class T>
HFLOW_HD T halve(T before, T left, T right, T after, T weight) {
  return weight * (before + after) + T(3) * weight * (left + right);
}

template <class T>
HFLOW_HD T doubled(T near, T far, T weight) {
  return T(3) * weight * near + weight * far;
}

// Which elements of an axis of n stand for those at −1 and n. The adjoint has zeros there instead, and adds what it
// would write at −1 and n to its results at these places.
struct ResampleEdges {
  int64_t before, after;

  HFLOW_HD ResampleEdges(bool up, int64_t n) : before(up ? 0 : 1), after(n - 2) {}
};

// ---- instance_norm: (x − mean)/√(var + ε), var unbiased ----

// From sums over the n values of d = x − center, where center is the mean as far as its dtype holds it: the rest of the
// mean, δ, is put back, so that a large mean costs no accuracy.
template <class T>
struct InstanceNorm {
  T rest, inverse_std, n;

  HFLOW_HD InstanceNorm(T n, T sum_d, T sum_d_squared, T epsilon)
      : rest(sum_d / n), inverse_std(T(1) / sqrt((sum_d_squared - sum_d * rest) / (n - T(1)) + epsilon)), n(n) {}

  // y = scale·d + shift
  HFLOW_HD T scale() const { return inverse_std; }
  HFLOW_HD T shift() const { return -rest * inverse_std; }
};

// grad_x = of_grad·grad_y + of_d·d + constant, with the sums of grad_y and of grad_y·d.
template <class T>
struct InstanceNormGradient {
  T of_grad, of_d, constant;

  HFLOW_HD InstanceNormGradient(const InstanceNorm<T>& norm, T sum_grad, T sum_grad_d) : of_grad(norm.scale()) {
    const T projection = sum_grad_d - norm.rest * sum_grad;  // Σ grad_y·(x − mean)
    of_d = -norm.scale() * norm.scale() * norm.scale() * projection / (norm.n - T(1));
    constant = -norm.scale() * sum_grad / norm.n - of_d * norm.rest;
  }
};

// ---- bias_act: y = (a(x + b) + residual)·gain. Activations in the order of hflow_fast/ops/bias_act.py ----

enum class Activation : int { linear, leaky_relu, tanh };
inline constexpr int kActivations = 3;

// a(v) = v
struct Linear {
  template <class T> HFLOW_HD static T value(T v, T) { return v; }
  template <class T> HFLOW_HD static T derivative(T, T) { return T(1); }
};

// a(v) = v above 0, slope·v else. As in torch, the derivative at 0 is the slope.
struct LeakyRelu {
  template <class T> HFLOW_HD static T value(T v, T slope) { return v > T(0) ? v : slope * v; }
  template <class T> HFLOW_HD static T derivative(T v, T slope) { return v > T(0) ? T(1) : slope; }
};

// a(v) = tanh v
struct HyperbolicTangent {
  template <class T> HFLOW_HD static T value(T v, T) { return math::tanh(v); }
  template <class T> HFLOW_HD static T derivative(T v, T) { return math::tanh_derivative(v); }
};

// f(A{}) for the activation of that number.
template <class F>
HFLOW_HD void visit_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::linear: return f(Linear{});
    case Activation::leaky_relu: return f(LeakyRelu{});
    case Activation::tanh: return f(HyperbolicTangent{});
  }
}

template <class A, class T>
HFLOW_HD T bias_act(T x, T bias, T residual, T slope, T gain) {
  return (A::value(x + bias, slope) + residual) * gain;
}

// grad_x; its sum over a channel is bias's, and residual's is grad_y·gain.
template <class A, class T>
HFLOW_HD T bias_act_backward(T x, T bias, T grad_y, T slope, T gain) {
  return grad_y * gain * A::derivative(x + bias, slope);
}

}  // namespace hflow
