// actnorm on the CPU: y = x·e^s + b per channel, its inverse and backward.
//
// Threads: chunks of about 16 Ki elements. Bytes: one read and one write of x forward; two reads and one write
// backward. Long channel rows (contiguous) take one scalar scale per row. Short rows and channels_last, where the
// channel changes from element to element, walk a per-element pattern of scales that repeats every sample or pixel.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensor.h"
#include "cpu/channel_plan.h"

namespace hflow {
namespace {

// y = (x − center)·scale + shift: both directions, since one of center and shift is zero.
template <class T>
struct ChannelAffine {
  std::vector<T> scale, center, shift;

  ChannelAffine(const Tensor& log_scale, const Tensor& bias, bool inverse)
      : scale(log_scale.numel()), center(scale.size()), shift(scale.size()) {
    const int64_t channels = log_scale.numel();
    gather(Memory::of(log_scale), 0, scale.data(), {1, channels, 0, 1, 0});
    gather(Memory::of(bias), 0, inverse ? center.data() : shift.data(), {1, channels, 0, 1, 0});
    for (T& s : scale) s = static_cast<T>(std::exp(inverse ? -static_cast<double>(s) : static_cast<double>(s)));
  }

  // Element e takes the values of channel (e / run) % channels.
  ChannelAffine(const ChannelAffine& channels, int64_t run, int64_t length)
      : scale(length), center(length), shift(length) {
    for (int64_t e = 0; e < length; ++e) {
      const int64_t c = (e / run) % static_cast<int64_t>(channels.scale.size());
      scale[e] = channels.scale[c], center[e] = channels.center[c], shift[e] = channels.shift[c];
    }
  }
};

template <class T>
struct RowForward {
  HFLOW_LEAF void run(const T* x, T* y, int64_t n, T scale, T center, T shift) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - center) * scale + shift;
  }
};

template <class T>
struct PatternForward {
  HFLOW_LEAF void run(const T* x, T* y, int64_t n, const T* scale, const T* center, const T* shift) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - center[i]) * scale[i] + shift[i];
  }
};

// grad_x, and the sums that give the gradients of scale and bias, in one pass: two vectors of lanes each, added up when
// the tile ends.
template <class T>
struct RowBackward {
  template <int Bytes>
  struct Wide {
    typedef T Vector __attribute__((vector_size(Bytes)));
    static constexpr int kWidth = Bytes / sizeof(T);

    HFLOW_LEAF void run(const T* x, const T* grad_y, T* grad_x, int64_t n, T scale, T center, double* grad_sum,
                        double* product_sum) {
      Vector grads[2] = {}, products[2] = {};
      int64_t i = 0;
      for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          Vector g, in;
          std::memcpy(&g, grad_y + i + v * kWidth, Bytes);
          std::memcpy(&in, x + i + v * kWidth, Bytes);
          grads[v] += g;
          products[v] += g * (in - center);
          const Vector out = g * scale;
          std::memcpy(grad_x + i + v * kWidth, &out, Bytes);
        }
      }
      T tail_grad = 0, tail_product = 0;
      for (; i < n; ++i) {
        tail_grad += grad_y[i];
        tail_product += grad_y[i] * (x[i] - center);
        grad_x[i] = grad_y[i] * scale;
      }
      *grad_sum += lanes_of(grads[0] + grads[1]) + tail_grad;
      *product_sum += lanes_of(products[0] + products[1]) + tail_product;
    }

   private:
    HFLOW_LEAF double lanes_of(const Vector& vector) {
      double total = 0;
      for (int j = 0; j < kWidth; ++j) total += static_cast<double>(vector[j]);
      return total;
    }
  };
};

template <class T>
struct PatternBackward {
  HFLOW_LEAF void run(const T* x, const T* grad_y, T* grad_x, T* grad_sum, T* product_sum, int64_t n, const T* scale,
                      const T* center) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      grad_sum[i] += grad_y[i];
      product_sum[i] += grad_y[i] * (x[i] - center[i]);
      grad_x[i] = grad_y[i] * scale[i];
    }
  }
};

template <class T>
void forward(const ChannelPlan& plan, const ChannelAffine<T>& affine, Memory x, Memory y) {
  if (plan.by_rows) {
    parallel_units(plan.row_units(), std::min(plan.run, kChunk), [&](int64_t unit) {
      alignas(64) T in[kTile], out[kTile];
      plan.for_row_tiles(unit, [&](int64_t c, int64_t offset, int64_t n) {
        run_leaf<RowForward<T>>(load(x, offset, n, in), target(y, offset, out), n, affine.scale[c], affine.center[c],
                                affine.shift[c]);
        store(out, y, offset, n);
      });
    });
    return;
  }
  const ChannelAffine<T> pattern(affine, plan.run, plan.pattern());
  parallel_units(plan.pattern_units(), plan.pattern_chunk(), [&](int64_t unit) {
    alignas(64) T in[kTile], out[kTile];
    plan.for_pattern_tiles(unit, [&](int64_t p, int64_t offset, int64_t n) {
      run_leaf<PatternForward<T>>(load(x, offset, n, in), target(y, offset, out), n, pattern.scale.data() + p,
                                  pattern.center.data() + p, pattern.shift.data() + p);
      store(out, y, offset, n);
    });
  });
}

// Per channel: Σ grad_y and Σ grad_y·(x − center), from partial sums per unit added in order.
struct ChannelSums {
  std::vector<double> grad, product;
};

template <class T>
ChannelSums backward(const ChannelPlan& plan, const ChannelAffine<T>& affine, Memory x, Memory grad_y, Memory grad_x) {
  ChannelSums sums{std::vector<double>(plan.channels), std::vector<double>(plan.channels)};
  if (plan.by_rows) {
    const int64_t units = plan.row_units();
    std::vector<double> partial(2 * units);
    parallel_units(units, std::min(plan.run, kChunk), [&](int64_t unit) {
      alignas(64) T in[kTile], grad[kTile], out[kTile];
      plan.for_row_tiles(unit, [&](int64_t c, int64_t offset, int64_t n) {
        run_wide_leaf<RowBackward<T>::template Wide>(load(x, offset, n, in), load(grad_y, offset, n, grad),
                                                     target(grad_x, offset, out), n, affine.scale[c], affine.center[c],
                                                     &partial[2 * unit], &partial[2 * unit + 1]);
        store(out, grad_x, offset, n);
      });
    });
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t c = plan.channel_of_unit(unit);
      sums.grad[c] += partial[2 * unit];
      sums.product[c] += partial[2 * unit + 1];
    }
    return sums;
  }
  const ChannelAffine<T> pattern(affine, plan.run, plan.pattern());
  const int64_t units = plan.pattern_units(), width = plan.pattern();
  std::vector<T> partial(2 * width * units);
  parallel_units(units, plan.pattern_chunk(), [&](int64_t unit) {
    alignas(64) T in[kTile], grad[kTile], out[kTile];
    T* grad_sum = partial.data() + 2 * width * unit;
    plan.for_pattern_tiles(unit, [&](int64_t p, int64_t offset, int64_t n) {
      run_leaf<PatternBackward<T>>(load(x, offset, n, in), load(grad_y, offset, n, grad), target(grad_x, offset, out),
                                   grad_sum + p, grad_sum + width + p, n, pattern.scale.data() + p,
                                   pattern.center.data() + p);
      store(out, grad_x, offset, n);
    });
  });
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t e = 0; e < width; ++e) {
      const int64_t c = plan.channel_of_element(e);
      sums.grad[c] += static_cast<double>(partial[2 * width * unit + e]);
      sums.product[c] += static_cast<double>(partial[2 * width * unit + width + e]);
    }
  }
  return sums;
}

double total_of(const Tensor& tensor) {
  std::vector<double> values(tensor.numel());
  gather(Memory::of(tensor), 0, values.data(), {1, tensor.numel(), 0, 1, 0});
  return std::accumulate(values.begin(), values.end(), 0.0);
}

void check(const Tensor& x, const Tensor& log_scale, const Tensor& bias) {
  check_flow_variable("actnorm", "x", x);
  check_floating("actnorm", "log_scale", log_scale);
  check_floating("actnorm", "bias", bias);
  check_shape("actnorm", "log_scale", log_scale, {x.size(1)});
  check_shape("actnorm", "bias", bias, {x.size(1)});
}

std::tuple<Tensor, Tensor> actnorm_fwd(Tensor x, Tensor log_scale, Tensor bias, bool inverse) {
  check(x, log_scale, bias);
  const MemoryFormat format = format_of(x);
  x = as_format(x, format), log_scale = as_format(log_scale, MemoryFormat::Contiguous),
  bias = as_format(bias, MemoryFormat::Contiguous);
  Tensor y = empty_in(x, format);
  Tensor log_det = empty(x, {x.size(0)}, compute_type(x.scalar_type()));
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if (x.numel() > 0)
      forward<T>(ChannelPlan(x, format), ChannelAffine<T>(log_scale, bias, inverse), Memory::of(x), Memory::of(y));
    const double value = static_cast<double>(pixels_of(x)) * total_of(log_scale);
    std::fill_n(static_cast<T*>(log_det.data_ptr()), x.size(0), static_cast<T>(inverse ? -value : value));
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor> actnorm_bwd(Tensor x, Tensor log_scale, Tensor bias, Tensor grad_y,
                                               Tensor grad_log_det, bool inverse) {
  check(x, log_scale, bias);
  check_gradients("actnorm", grad_y, grad_log_det, x);
  const MemoryFormat format = format_of(x);
  x = as_format(x, format), grad_y = as_format(grad_y, format);
  log_scale = as_format(log_scale, MemoryFormat::Contiguous), bias = as_format(bias, MemoryFormat::Contiguous);
  grad_log_det = as_format(grad_log_det, MemoryFormat::Contiguous);
  Tensor grad_x = empty_in(x, format);
  Tensor grad_log_scale = empty_in(log_scale, MemoryFormat::Contiguous),
         grad_bias = empty_in(bias, MemoryFormat::Contiguous);
  visit_compute_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const int64_t channels = x.size(1);
    const ChannelAffine<T> affine(log_scale, bias, inverse);
    ChannelSums sums{std::vector<double>(channels), std::vector<double>(channels)};
    if (x.numel() > 0)
      sums = backward<T>(ChannelPlan(x, format), affine, Memory::of(x), Memory::of(grad_y), Memory::of(grad_x));
    const double from_log_det = static_cast<double>(pixels_of(x)) * total_of(grad_log_det);
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = affine.scale[c];
      sums.product[c] = (inverse ? -1.0 : 1.0) * (scale * sums.product[c] + from_log_det);
      sums.grad[c] = inverse ? -scale * sums.grad[c] : sums.grad[c];
    }
    scatter(sums.product.data(), Memory::of(grad_log_scale), 0, {1, channels, 0, 1, 0});
    scatter(sums.grad.data(), Memory::of(grad_bias), 0, {1, channels, 0, 1, 0});
  });
  return {grad_x, grad_log_scale, grad_bias};
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CPU, m) {
  m.impl("actnorm_fwd", TORCH_BOX(&hflow::actnorm_fwd));
  m.impl("actnorm_bwd", TORCH_BOX(&hflow::actnorm_bwd));
}
