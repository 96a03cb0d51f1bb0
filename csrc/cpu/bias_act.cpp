// bias_act on the CPU: y = (a(x + b) + residual)·gain with one bias per channel, and backward.
//
// Threads: chunks of about 16 Ki elements. Bytes: one read of x and of the residual and one write forward; two reads and
// one write backward, and one more for the residual's gradient. Without a bias there are no channels: on the CPU a
// convolution adds its own for nothing.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/bias_act_check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"
#include "cpu/channel_plan.h"

namespace hflow {
namespace {

// The tiles of x: rows of one channel each (contiguous), or one row in which the channels repeat as in channel_plan.h.
// Without a bias, channels do not matter, and all of x is one long row.
template <class T>
class Tiles {
 public:
  Tiles(const Tensor& x, MemoryFormat format, const Tensor* bias) : plan_(x, format) {
    if (bias == nullptr) plan_.channels = 1, plan_.run = plan_.total, plan_.by_rows = true;
    std::vector<T> channels(plan_.channels);
    if (bias != nullptr) gather(Memory::of(*bias), 0, channels.data(), {1, plan_.channels, 0, 1, 0});
    if (plan_.by_rows) {
      rows_per_tile_ = std::max<int64_t>(1, kTile / plan_.run);
      rows_per_unit_ = std::max<int64_t>(1, kChunk / plan_.run);
    }
    // A tile of rows may begin at any channel.
    biases_.resize(plan_.by_rows ? plan_.channels + rows_per_tile_ : plan_.pattern());
    for (int64_t e = 0; e < static_cast<int64_t>(biases_.size()); ++e)
      biases_[e] = channels[plan_.by_rows ? e % plan_.channels : plan_.channel_of_element(e)];
  }

  bool by_rows() const { return plan_.by_rows; }
  int64_t channels() const { return plan_.channels; }
  int64_t units() const {
    if (!plan_.by_rows) return plan_.pattern_units();
    return (rows() + rows_per_unit_ - 1) / rows_per_unit_ * plan_.chunks_per_row();
  }
  int64_t cost() const { return plan_.by_rows ? std::min(plan_.run * rows_per_unit_, kChunk) : plan_.pattern_chunk(); }

  // f(biases, partial, offset, rows, n) for the tiles of a unit: `rows` rows of n elements. The sums that belong to the
  // biases go to `partial` of partials(), one per row, or one per element of the pattern.
  template <class F>
  void for_tiles(int64_t unit, const F& f) const {
    if (!plan_.by_rows) {
      plan_.for_pattern_tiles(unit, [&](int64_t p, int64_t offset, int64_t n) {
        f(biases_.data() + p, unit * plan_.pattern() + p, offset, int64_t{1}, n);
      });
      return;
    }
    const int64_t chunk = unit % plan_.chunks_per_row(), row = unit / plan_.chunks_per_row() * rows_per_unit_;
    const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, plan_.run);
    for (int64_t r = row; r < std::min(row + rows_per_unit_, rows()); r += rows_per_tile_) {
      const int64_t tile_rows = std::min({rows_per_tile_, rows() - r, row + rows_per_unit_ - r});
      for (int64_t p = begin; p < end; p += kTile)
        f(biases_.data() + r % plan_.channels, r * plan_.chunks_per_row() + chunk, r * plan_.run + p, tile_rows,
          std::min(kTile, end - p));
    }
  }

  int64_t partials() const { return plan_.by_rows ? rows() * plan_.chunks_per_row() : units() * plan_.pattern(); }
  int64_t channel_of_partial(int64_t i) const {
    return plan_.by_rows ? i / plan_.chunks_per_row() % plan_.channels : plan_.channel_of_element(i % plan_.pattern());
  }

 private:
  int64_t rows() const { return plan_.total / plan_.run; }

  ChannelPlan plan_;
  int64_t rows_per_tile_ = 1, rows_per_unit_ = 1;
  std::vector<T> biases_;
};

template <class T>
struct Parameters {
  T slope, gain;
};

template <class A, bool ByRows, bool WithResidual, class T>
struct Forward {
  HFLOW_LEAF void run(const T* x, const T* bias, const T* residual, T* y, int64_t rows, int64_t n, Parameters<T> p) {
    for (int64_t r = 0; r < rows; ++r) {
      const T of_row = bias[r];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const int64_t e = r * n + i;
        y[e] = bias_act<A>(x[e], ByRows ? of_row : bias[i], WithResidual ? residual[e] : T(0), p.slope, p.gain);
      }
    }
  }
};

template <class A, bool ByRows, class T>
struct Backward {
  HFLOW_LEAF void run(const T* x, const T* bias, const T* grad_y, T* grad_x, int64_t rows, int64_t n,
                      Parameters<T> p) {
    for (int64_t r = 0; r < rows; ++r) {
      const T of_row = bias[r];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const int64_t e = r * n + i;
        grad_x[e] = bias_act_backward<A>(x[e], ByRows ? of_row : bias[i], grad_y[e], p.slope, p.gain);
      }
    }
  }
};

// sums += the sum of every row, or the row itself.
template <bool ByRows, class T>
struct AddToSums {
  HFLOW_LEAF void run(const T* values, double* sums, int64_t rows, int64_t n) {
    if constexpr (ByRows) {
      for (int64_t r = 0; r < rows; ++r) {
        double total;
        detail::Sum<T>::run(values + r * n, n, &total);
        sums[r] += total;
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(values[i]);
    }
  }
};

template <class T>
struct Scale {
  HFLOW_LEAF void run(const T* x, T* y, int64_t n, T factor) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
  }
};

// f(std::bool_constant) for a choice at run time.
template <class F>
void visit_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

template <class A, class T>
void forward(const Tiles<T>& tiles, Memory x, const Memory* residual, Memory y, Parameters<T> p) {
  visit_bool(tiles.by_rows(), [&](auto by_rows) {
    visit_bool(residual != nullptr, [&](auto with_residual) {
      parallel_units(tiles.units(), tiles.cost(), [&](int64_t unit) {
        alignas(64) T in[kTile], other[kTile], out[kTile];
        tiles.for_tiles(unit, [&](const T* biases, int64_t, int64_t offset, int64_t rows, int64_t n) {
          const T* merged = with_residual ? load(*residual, offset, rows * n, other) : nullptr;
          run_leaf<Forward<A, by_rows, with_residual, T>>(load(x, offset, rows * n, in), biases, merged,
                                                          target(y, offset, out), rows, n, p);
          store(out, y, offset, rows * n);
        });
      });
    });
  });
}

// The gradient of the bias goes to grad_bias unless that is null, and that of the residual likewise.
template <class A, class T>
void backward(const Tiles<T>& tiles, Memory x, Memory grad_y, Memory grad_x, double* grad_bias,
              const Memory* grad_residual, Parameters<T> p) {
  std::vector<double> partial(grad_bias ? tiles.partials() : 0);
  visit_bool(tiles.by_rows(), [&](auto by_rows) {
    parallel_units(tiles.units(), tiles.cost(), [&](int64_t unit) {
      alignas(64) T in[kTile], grad[kTile], out[kTile];
      tiles.for_tiles(unit, [&](const T* biases, int64_t at, int64_t offset, int64_t rows, int64_t n) {
        const T* g = load(grad_y, offset, rows * n, grad);
        T* results = target(grad_x, offset, out);
        run_leaf<Backward<A, by_rows, T>>(load(x, offset, rows * n, in), biases, g, results, rows, n, p);
        if (grad_bias != nullptr)
          run_leaf<AddToSums<by_rows, T>>(static_cast<const T*>(results), partial.data() + at, rows, n);
        store(out, grad_x, offset, rows * n);
        if (grad_residual == nullptr) return;
        run_leaf<Scale<T>>(g, target(*grad_residual, offset, out), rows * n, p.gain);
        store(out, *grad_residual, offset, rows * n);
      });
    });
  });
  for (int64_t i = 0; i < static_cast<int64_t>(partial.size()); ++i)
    grad_bias[tiles.channel_of_partial(i)] += partial[i];
}

Tensor bias_act_fwd(Tensor x, Tensor bias, Tensor residual, int64_t activation, double slope, double gain) {
  check_bias_act(x, bias, residual, activation);
  const MemoryFormat format = format_of(x);
  const bool merges = !is_absent(residual);
  x = as_format(x, format), bias = as_format(bias, MemoryFormat::Contiguous);
  if (merges) residual = as_format(residual, format);
  Tensor y = empty_in(x, format);
  if (x.numel() == 0) return y;
  const Memory other = Memory::of(residual);
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    visit_activation(static_cast<Activation>(activation), [&](auto a) {
      forward<decltype(a), T>(Tiles<T>(x, format, is_absent(bias) ? nullptr : &bias), Memory::of(x),
                              merges ? &other : nullptr, Memory::of(y),
                              {static_cast<T>(slope), static_cast<T>(gain)});
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bias_act_bwd(Tensor x, Tensor bias, Tensor residual, Tensor grad_y,
                                                int64_t activation, double slope, double gain) {
  check_bias_act(x, bias, residual, activation);
  check_floating("bias_act", "grad_y", grad_y);
  check_like("bias_act", "grad_y", grad_y, x, x.size(1));
  const MemoryFormat format = format_of(x);
  const bool biased = !is_absent(bias), merges = !is_absent(residual);
  x = as_format(x, format), grad_y = as_format(grad_y, format), bias = as_format(bias, MemoryFormat::Contiguous);
  Tensor grad_x = empty_in(x, format), grad_bias = empty_in(bias, MemoryFormat::Contiguous);
  Tensor grad_residual = empty_in(residual, merges ? format : MemoryFormat::Contiguous);
  const Memory grad_other = Memory::of(grad_residual);
  std::vector<double> sums(bias.numel());
  if (x.numel() > 0) {
    visit_compute_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      visit_activation(static_cast<Activation>(activation), [&](auto a) {
        backward<decltype(a), T>(Tiles<T>(x, format, biased ? &bias : nullptr), Memory::of(x), Memory::of(grad_y),
                                 Memory::of(grad_x), biased ? sums.data() : nullptr, merges ? &grad_other : nullptr,
                                 {static_cast<T>(slope), static_cast<T>(gain)});
      });
    });
  }
  scatter(sums.data(), Memory::of(grad_bias), 0, {1, bias.numel(), 0, 1, 0});
  return {grad_x, grad_bias, grad_residual};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("bias_act_fwd", TORCH_BOX(&hflow::bias_act_fwd));
  m.impl("bias_act_bwd", TORCH_BOX(&hflow::bias_act_bwd));
}
