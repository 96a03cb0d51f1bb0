// The kernels of csrc/cuda/flow_step.cuh against double on the host: dtypes and pairs of dtypes, both memory formats, 1
// to 32 channels, every scale map, layout, form and active set, pixel counts that tiles and vectors do not divide,
// several samples per tile and several tiles per sample, more tiles than backward has blocks, unaligned memory, empty
// inputs; the same bits in a second run.
// The expected gradients are derivatives of the expected outputs, written out here.
#include "cuda/flow_step.cuh"

#include <cstdio>
#include <limits>

#include "check.h"
#include "device.h"
#include "values.h"

namespace {

using namespace hflow;

struct Case {
  int64_t samples;
  int channels;
  int64_t height, width;
  bool channels_last;
  CouplingOptions options;
  bool compact;   // raw holds nothing for passive channels
  size_t offset;  // elements by which tensors miss a 16-byte boundary
};

// λ(s) and λ'(s).
struct LogScale {
  double value, derivative;
};
LogScale log_scale(ScaleMap map, double s, double clamp) {
  const double sigma = 1 / (1 + std::exp(-s - 2)), tanh = std::tanh(s), soft = std::tanh(s / clamp);
  switch (map) {
    case ScaleMap::none: return {0, 0};
    case ScaleMap::exp: return {s, 1};
    case ScaleMap::exp_clip: return {std::fmin(std::fmax(s, -clamp), clamp), std::fabs(s) <= clamp ? 1.0 : 0.0};
    case ScaleMap::exp_tanh: return {tanh, 1 - tanh * tanh};
    case ScaleMap::sigmoid: return {std::log(sigma), 1 - sigma};
    case ScaleMap::sigmoid_inverse: return {-std::log(sigma), sigma - 1};
    case ScaleMap::sigmoid_floor: return {std::log(sigma + 1e-3), sigma * (1 - sigma) / (sigma + 1e-3)};
    case ScaleMap::atan: return {0.636 * clamp * std::atan(s), 0.636 * clamp / (1 + s * s)};
    case ScaleMap::tanh: return {clamp * soft, 1 - soft * soft};
  }
  return {};
}

bool is_active(const Case& c, int channel, int64_t i, int64_t j) {
  const CouplingOptions& o = c.options;
  switch (o.active) {
    case ActiveSet::all: return true;
    case ActiveSet::channels: return channel >= c.channels / 2;
    case ActiveSet::channels_ceil: return channel >= (c.channels + 1) / 2;
    case ActiveSet::checkerboard: return (i / o.block + j / o.block) % 2 == o.parity;
    case ActiveSet::columns: return (j >= c.width / 2) == (o.parity == 1);
    case ActiveSet::rows: return (i >= c.height / 2) == (o.parity == 1);
  }
  return false;
}

template <class S, class R, class T>
void test_case(const Case& c, const std::string& types) {
  const CouplingOptions& o = c.options;
  const int64_t pixels = c.height * c.width, channels = c.channels;
  char text[200];
  std::snprintf(text, sizeof text,
                "%s (%d, %d, %d, %d)%s map %d layout %d form %d active %d block %d parity %d%s%s%s: ",
                types.c_str(), int(c.samples), c.channels, int(c.height), int(c.width),
                c.channels_last ? " channels last" : "", int(o.map), int(o.layout), int(o.form), int(o.active),
                int(o.block), int(o.parity), o.inverse ? " inverse" : "", c.compact ? " compact" : "",
                c.offset ? " unaligned" : "");
  const std::string name = text;
  const int passive = o.active == ActiveSet::channels        ? c.channels / 2
                      : o.active == ActiveSet::channels_ceil ? (c.channels + 1) / 2
                                                             : 0;
  const int values = o.map == ScaleMap::none ? 1 : 2, skipped = c.compact ? passive : 0;
  const int with_raw = c.channels - skipped, raw_channels = values * with_raw;
  const bool interleaved = o.layout == Layout::interleaved || o.layout == Layout::interleaved_shift_first;
  const bool shift_first = o.layout == Layout::halves_shift_first || o.layout == Layout::interleaved_shift_first;
  const auto place = [&](int64_t of, int64_t b, int64_t channel, int64_t pixel) {
    return c.channels_last ? (b * pixels + pixel) * of + channel : (b * of + channel) * pixels + pixel;
  };
  // Where raw keeps the scale (second = shift_first) or the shift of a channel.
  const auto raw_channel = [&](int channel, bool second) {
    if (values == 1) return channel - skipped;
    return interleaved ? 2 * (channel - skipped) + second : channel - skipped + (second ? with_raw : 0);
  };

  const int64_t n = c.samples * channels * pixels, raw_n = c.samples * raw_channels * pixels;
  const std::vector<S> x = test::normal<S>(n, 1), grad_y = test::normal<S>(n, 2);
  const std::vector<R> raw = test::normal<R>(raw_n, 3);
  const std::vector<T> weight = test::normal<T>(channels * channels, 4), bias = test::normal<T>(channels, 5),
                       grad_log_det = test::normal<T>(c.samples, 6);

  const auto zeros = [](int64_t size) { return std::vector<double>(size); };
  std::vector<double> y = zeros(n), y_size = zeros(n), log_det = zeros(c.samples), log_det_size = zeros(c.samples),
                      grad_x = zeros(n), grad_x_size = zeros(n), grad_raw = zeros(raw_n), grad_raw_size = zeros(raw_n),
                      grad_weight = zeros(channels * channels), grad_weight_size = zeros(channels * channels),
                      grad_bias = zeros(channels), grad_bias_size = zeros(channels);
  const double sign = o.inverse ? -1 : 1;
  const bool before = (o.form != Form::scale_shift) != o.inverse;
  const double shift_sign = (o.form == Form::subtract_scale) != o.inverse ? -1 : 1;
  for (int64_t b = 0; b < c.samples; ++b) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      std::vector<double> u(channels), u_size(channels);
      for (int channel = 0; channel < channels; ++channel) {
        const int64_t at = place(channels, b, channel, pixel);
        const double value = test::as_double(x[at]);
        double grad_u = 0, grad_u_size = 0;
        for (int k = 0; k < channels; ++k) {
          const double g = test::as_double(grad_y[place(channels, b, k, pixel)]);
          const double term = double(weight[k * channels + channel]) * g;
          grad_u += term, grad_u_size += std::fabs(term);
        }
        u[channel] = value, u_size[channel] = std::fabs(value), grad_x[at] = grad_u, grad_x_size[at] = grad_u_size;
        if (!is_active(c, channel, pixel / c.width, pixel % c.width)) continue;
        const int64_t shift_at = place(raw_channels, b, raw_channel(channel, !shift_first), pixel);
        const int64_t scale_at = place(raw_channels, b, raw_channel(channel, shift_first), pixel);
        const double s = values == 2 ? test::as_double(raw[scale_at]) : 0, t = test::as_double(raw[shift_at]);
        const LogScale scale = log_scale(o.map, s, o.clamp);
        const double a = std::exp(sign * scale.value);
        const double shift = shift_sign * std::fmin(std::fmax(t, -o.shift_clamp), o.shift_clamp);
        u[channel] = before ? (value + shift) * a : value * a + shift;
        u_size[channel] = (std::fabs(value) + std::fabs(shift)) * std::fmax(a, 1);
        log_det[b] += sign * scale.value, log_det_size[b] += std::fabs(scale.value) + 0.1;
        grad_x[at] = grad_u * a, grad_x_size[at] = grad_u_size * a;
        const double grad_log_scale = grad_u * a * (before ? value + shift : value) + double(grad_log_det[b]);
        if (values == 2) {
          grad_raw[scale_at] = grad_log_scale * sign * scale.derivative;
          grad_raw_size[scale_at] = grad_u_size * a * (std::fabs(value) + std::fabs(shift)) +
                                    std::fabs(double(grad_log_det[b]));
        }
        grad_raw[shift_at] = std::fabs(t) <= o.shift_clamp ? (before ? grad_u * a : grad_u) * shift_sign : 0;
        grad_raw_size[shift_at] = grad_u_size * std::fmax(a, 1);
      }
      for (int k = 0; k < channels; ++k) {
        const int64_t at = place(channels, b, k, pixel);
        const double g = test::as_double(grad_y[at]);
        y[at] = double(bias[k]), y_size[at] = std::fabs(double(bias[k]));
        grad_bias[k] += g, grad_bias_size[k] += std::fabs(g);
        for (int channel = 0; channel < channels; ++channel) {
          const double w = double(weight[k * channels + channel]);
          y[at] += w * u[channel], y_size[at] += std::fabs(w) * u_size[channel];
          grad_weight[k * channels + channel] += g * u[channel];
          grad_weight_size[k * channels + channel] += std::fabs(g) * u_size[channel];
        }
      }
    }
  }

  const CouplingGeometry geometry(o, channels, raw_channels, c.height, c.width);
  const cuda::MixShape shape{c.samples, c.channels, pixels, !c.channels_last && pixels > 1};
  const test::Buffer<S> x_device(x, c.offset), grad_y_device(grad_y, c.offset);
  const test::Buffer<R> raw_device(raw, c.offset);
  const test::Buffer<T> weight_device(weight), bias_device(bias), grad_log_det_device(grad_log_det);
  const double epsilon = std::is_same_v<T, double> ? 4e-15 : 2e-6;
  const auto rounding = [](auto value) {
    return std::is_same_v<decltype(value), __nv_bfloat16> ? 4e-3 : std::is_same_v<decltype(value), __half> ? 5e-4 : 0;
  };
  test::Repeatable repeatable(name);
  for (int repeat = 0; repeat < 2; ++repeat) {
    test::Buffer<S> y_device(n, c.offset), grad_x_device(n, c.offset);
    test::Buffer<R> grad_raw_device(raw_n, c.offset);
    test::Buffer<T> log_det_device(c.samples), grad_weight_device(channels * channels), grad_bias_device(channels);
    test::Buffer<T> forward_partial(cuda::flow_step_forward_partial_size<S>(shape));
    test::Buffer<T> backward_partial(cuda::flow_step_backward_partial_size<S>(shape));
    test::require(cuda::flow_step_forward(x_device.data(), raw_device.data(), weight_device.data(), bias_device.data(),
                                          y_device.data(), log_det_device.data(), forward_partial.data(), shape, o,
                                          geometry, cudaStream_t{}),
                  "forward");
    test::require(
        cuda::flow_step_backward(x_device.data(), raw_device.data(), weight_device.data(), grad_y_device.data(),
                                 grad_log_det_device.data(), grad_x_device.data(), grad_raw_device.data(),
                                 grad_weight_device.data(), grad_bias_device.data(), backward_partial.data(), shape, o,
                                 geometry, cudaStream_t{}),
        "backward");
    forward_partial.read(), backward_partial.read();
    repeatable.expect_all("y", y_device.read(), y, y_size, epsilon + rounding(S{}));
    repeatable.expect_all("log_det", log_det_device.read(), log_det, log_det_size, epsilon);
    repeatable.expect_all("grad_x", grad_x_device.read(), grad_x, grad_x_size, epsilon + rounding(S{}));
    repeatable.expect_all("grad_raw", grad_raw_device.read(), grad_raw, grad_raw_size, epsilon + rounding(R{}));
    repeatable.expect_all("grad_weight", grad_weight_device.read(), grad_weight, grad_weight_size, epsilon);
    repeatable.expect_all("grad_bias", grad_bias_device.read(), grad_bias, grad_bias_size, epsilon);
  }
}

}  // namespace

int main() {
  test::skip_without_gpu();
  constexpr double kNoClamp = std::numeric_limits<double>::infinity();
  const CouplingOptions clipped{ScaleMap::exp_clip, 1.2, 1.5, Layout::halves, Form::scale_shift, ActiveSet::all, 1, 0,
                                false};
  // Every scale map with every form, forward and inverse.
  for (int map = 0; map < kScaleMaps; ++map) {
    for (int form = 0; form < 3; ++form) {
      CouplingOptions options = clipped;
      options.map = static_cast<ScaleMap>(map), options.form = static_cast<Form>(form);
      options.inverse = (map + form) % 2 == 1, options.clamp = 1.7;
      options.shift_clamp = form == 0 ? kNoClamp : 1.1;
      test_case<float, float, float>({2, 3, 2, 8, map % 2 == 1, options, false, 0}, "float32");
      options.inverse = !options.inverse;
      test_case<double, double, double>({2, 2, 3, 4, map % 2 == 0, options, false, 0}, "float64");
    }
  }
  // Every layout and active set, in both formats, whole and compact raw.
  for (int active = 0; active < 6; ++active) {
    for (int layout = 0; layout < 4; ++layout) {
      for (bool channels_last : {false, true}) {
        CouplingOptions options = clipped;
        options.active = static_cast<ActiveSet>(active), options.layout = static_cast<Layout>(layout);
        options.block = int64_t{1} << (active + layout) % 4, options.parity = layout % 2;
        test_case<float, float, float>({3, 5, 9, 4, channels_last, options, false, 0}, "float32");
        test_case<float, __nv_bfloat16, float>({1, 8, 6, 8, channels_last, options, layout % 2 == 0, 0},
                                               "float32/bfloat16");
      }
    }
  }
  // Every number of channels that is special, tiles of several samples and of parts of one.
  CouplingOptions halves = clipped;
  halves.active = ActiveSet::channels, halves.map = ScaleMap::exp;
  for (int channels : {1, 2, 3, 4, 5, 8, 12, 16, 24, 31, 32})
    for (bool channels_last : {false, true})
      test_case<float, float, float>({2, channels, 7, 11, channels_last, halves, channels % 2 == 0, 0}, "float32");
  const Case shapes[] = {
      {1, 3, 50, 22, false, halves, true, 0}, {2, 3, 19, 31, true, clipped, true, 0},
      {1, 32, 33, 8, false, halves, true, 0}, {17, 4, 1, 1, false, halves, true, 0},
      {1, 1, 1, 1, false, clipped, true, 0},  {0, 3, 2, 2, false, clipped, true, 0},
      {2, 0, 2, 2, true, clipped, true, 0},   {2, 3, 0, 2, false, clipped, true, 0},
  };
  for (Case shape : shapes) {
    for (size_t offset : {0, 1}) {
      shape.offset = offset;
      test_case<float, float, float>(shape, "float32");
      test_case<float, __nv_bfloat16, float>(shape, "float32/bfloat16");
      test_case<float, __half, float>(shape, "float32/float16");
      test_case<double, double, double>(shape, "float64");
      test_case<__nv_bfloat16, __nv_bfloat16, float>(shape, "bfloat16");
      test_case<__half, __half, float>(shape, "float16");
    }
  }
  // Small tiles, but more of them than backward has blocks: once, since they are many.
  test_case<double, double, double>({540, 17, 11, 3, false, clipped, false, 0}, "float64");
  return test::report();
}
