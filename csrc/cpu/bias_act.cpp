// bias_act on the CPU: y = (a(x + b) + residual)·gain with one bias per channel, and backward.
//
// Threads: chunks of about 16 Ki elements. Bytes: one read of x and of the residual and one write forward; two reads and
// one write backward, and one more for the residual's gradient. A tile's biases lie in a row of their own, filled with
// one number for a channel's row and with the repeating pattern otherwise, so that one leaf serves both.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"
#include "cpu/channel_plan.h"
#include "network_formulas.h"

namespace hflow {
namespace {

template <class T>
struct Parameters {
  T slope, gain;
};

template <class A, class T>
struct Forward {
  HFLOW_LEAF void run(const T* x, const T* bias, T* y, int64_t n, Parameters<T> p) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = bias_act<A>(x[i], bias[i], T(0), p.slope, p.gain);
  }
};

template <class A, class T>
struct ForwardResidual {
  HFLOW_LEAF void run(const T* x, const T* bias, const T* residual, T* y, int64_t n, Parameters<T> p) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = bias_act<A>(x[i], bias[i], residual[i], p.slope, p.gain);
  }
};

template <class A, class T>
struct Backward {
  HFLOW_LEAF void run(const T* x, const T* bias, const T* grad_y, T* grad_x, int64_t n, Parameters<T> p) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) grad_x[i] = bias_act_backward<A>(x[i], bias[i], grad_y[i], p.slope, p.gain);
  }
};

template <class T>
struct Scale {
  HFLOW_LEAF void run(const T* x, T* y, int64_t n, T factor) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
  }
};

template <class T>
struct Add {
  HFLOW_LEAF void run(const T* x, T* sums, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) sums[i] += x[i];
  }
};

// The biases as the tiles of a plan meet them.
template <class T>
class Biases {
 public:
  Biases(const ChannelPlan& plan, const Tensor& bias) : plan_(plan), values_(plan.by_rows ? plan.channels : plan.pattern()) {
    std::vector<T> channels(plan.channels);
    gather(Memory::of(bias), 0, channels.data(), {1, plan.channels, 0, 1, 0});
    for (int64_t e = 0; e < static_cast<int64_t>(values_.size()); ++e)
      values_[e] = channels[plan.by_rows ? e : plan.channel_of_element(e)];
  }

  int64_t units() const { return plan_.by_rows ? plan_.row_units() : plan_.pattern_units(); }
  int64_t cost() const { return plan_.by_rows ? std::min(plan_.run, kChunk) : plan_.pattern_chunk(); }

  // f(biases, position, offset, n) for the tiles of a unit; `position` counts from the start of the pattern.
  template <class F>
  void for_tiles(int64_t unit, const F& f) const {
    if (plan_.by_rows) {
      alignas(64) T row[kTile];
      std::fill_n(row, std::min(plan_.run, kTile), values_[plan_.channel_of_unit(unit)]);
      plan_.for_row_tiles(unit, [&](int64_t, int64_t offset, int64_t n) { f(row, int64_t{0}, offset, n); });
    } else {
      plan_.for_pattern_tiles(unit, [&](int64_t p, int64_t offset, int64_t n) { f(values_.data() + p, p, offset, n); });
    }
  }

 private:
  const ChannelPlan& plan_;
  std::vector<T> values_;
};

template <class A, class T>
void forward(const ChannelPlan& plan, const Tensor& bias, Memory x, const Memory* residual, Memory y, Parameters<T> p) {
  const Biases<T> biases(plan, bias);
  parallel_units(biases.units(), biases.cost(), [&](int64_t unit) {
    alignas(64) T in[kTile], other[kTile], out[kTile];
    biases.for_tiles(unit, [&](const T* b, int64_t, int64_t offset, int64_t n) {
      const T* values = load(x, offset, n, in);
      if (residual == nullptr) {
        run_leaf<Forward<A, T>>(values, b, target(y, offset, out), n, p);
      } else {
        run_leaf<ForwardResidual<A, T>>(values, b, load(*residual, offset, n, other), target(y, offset, out), n, p);
      }
      store(out, y, offset, n);
    });
  });
}

// Returns the bias's gradient.
template <class A, class T>
std::vector<double> backward(const ChannelPlan& plan, const Tensor& bias, Memory x, Memory grad_y, Memory grad_x,
                             const Memory* grad_residual, Parameters<T> p) {
  const Biases<T> biases(plan, bias);
  const int64_t units = biases.units(), width = plan.by_rows ? 1 : plan.pattern();
  std::vector<T> partial(width * units);
  parallel_units(units, biases.cost(), [&](int64_t unit) {
    alignas(64) T in[kTile], grad[kTile], out[kTile];
    T* sums = partial.data() + width * unit;
    double row_sum = 0;
    biases.for_tiles(unit, [&](const T* b, int64_t position, int64_t offset, int64_t n) {
      const T* g = load(grad_y, offset, n, grad);
      T* results = target(grad_x, offset, out);
      run_leaf<Backward<A, T>>(load(x, offset, n, in), b, g, results, n, p);
      if (plan.by_rows) {
        row_sum += sum<T>(results, n);
      } else {
        run_leaf<Add<T>>(static_cast<const T*>(results), sums + position, n);
      }
      store(out, grad_x, offset, n);
      if (grad_residual != nullptr) {
        run_leaf<Scale<T>>(g, target(*grad_residual, offset, out), n, p.gain);
        store(out, *grad_residual, offset, n);
      }
    });
    if (plan.by_rows) *sums = static_cast<T>(row_sum);
  });
  std::vector<double> grad_bias(plan.channels);
  for (int64_t unit = 0; unit < units; ++unit)
    for (int64_t e = 0; e < width; ++e)
      grad_bias[plan.by_rows ? plan.channel_of_unit(unit) : plan.channel_of_element(e)] +=
          static_cast<double>(partial[width * unit + e]);
  return grad_bias;
}

// An empty vector stands for no residual.
bool is_absent(const Tensor& residual) { return residual.dim() == 1 && residual.numel() == 0; }

void check(const Tensor& x, const Tensor& bias, const Tensor& residual, int64_t activation) {
  check_flow_variable("bias_act", "x", x);
  check_floating("bias_act", "bias", bias);
  check_floating("bias_act", "residual", residual);
  check_shape("bias_act", "bias", bias, {x.size(1)});
  if (!is_absent(residual)) check_like("bias_act", "residual", residual, x, x.size(1));
  if (activation < 0 || activation >= kActivations)
    fail("bias_act", "activation must be from 0 to ", kActivations - 1, ", got ", activation);
}

Tensor bias_act_fwd(Tensor x, Tensor bias, Tensor residual, int64_t activation, double slope, double gain) {
  check(x, bias, residual, activation);
  const MemoryFormat format = format_of(x);
  const bool absent = is_absent(residual);
  x = as_format(x, format), bias = as_format(bias, MemoryFormat::Contiguous);
  if (!absent) residual = as_format(residual, format);
  Tensor y = empty_in(x, format);
  if (x.numel() == 0) return y;
  const Memory other = Memory::of(residual);
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    visit_activation(static_cast<Activation>(activation), [&](auto a) {
      forward<decltype(a), T>(ChannelPlan(x, format), bias, Memory::of(x), absent ? nullptr : &other, Memory::of(y),
                              {static_cast<T>(slope), static_cast<T>(gain)});
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bias_act_bwd(Tensor x, Tensor bias, Tensor residual, Tensor grad_y,
                                                int64_t activation, double slope, double gain) {
  check(x, bias, residual, activation);
  check_floating("bias_act", "grad_y", grad_y);
  check_like("bias_act", "grad_y", grad_y, x, x.size(1));
  const MemoryFormat format = format_of(x);
  const bool absent = is_absent(residual);
  x = as_format(x, format), grad_y = as_format(grad_y, format), bias = as_format(bias, MemoryFormat::Contiguous);
  Tensor grad_x = empty_in(x, format), grad_bias = empty_in(bias, MemoryFormat::Contiguous);
  Tensor grad_residual = empty_in(residual, absent ? MemoryFormat::Contiguous : format);
  const Memory grad_other = Memory::of(grad_residual);
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    std::vector<double> sums(x.size(1));
    if (x.numel() > 0) {
      visit_activation(static_cast<Activation>(activation), [&](auto a) {
        sums = backward<decltype(a), T>(ChannelPlan(x, format), bias, Memory::of(x), Memory::of(grad_y),
                                        Memory::of(grad_x), absent ? nullptr : &grad_other,
                                        {static_cast<T>(slope), static_cast<T>(gain)});
      });
    }
    scatter(sums.data(), Memory::of(grad_bias), 0, {1, x.size(1), 0, 1, 0});
  });
  return {grad_x, grad_bias, grad_residual};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("bias_act_fwd", TORCH_BOX(&hflow::bias_act_fwd));
  m.impl("bias_act_bwd", TORCH_BOX(&hflow::bias_act_bwd));
}
