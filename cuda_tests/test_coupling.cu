// The kernels of csrc/cuda/coupling.cuh against double on the host: every map, form, layout and active set in both
// memory formats, dtypes and mixtures of them, odd sizes, unaligned memory, samples from one element to several blocks,
// NaN and Inf; the same bits in a second run. Raw values that a coupling ignores are NaN throughout.
#include "cuda/coupling.cuh"

#include <cstring>
#include <random>
#include <string>
#include <type_traits>

#include "check.h"
#include "device.h"
#include "values.h"

namespace {

using hflow::ActiveSet;
using hflow::CouplingGeometry;
using hflow::CouplingOptions;
using hflow::Form;
using hflow::Layout;
using hflow::ScaleMap;
using hflow::cuda::CouplingMemory;
using test::as_double;

struct Shape {
  int64_t samples, channels, height, width;
  bool channels_last;

  int64_t pixels() const { return height * width; }
  int64_t total() const { return samples * channels * pixels(); }
};

struct Case {
  CouplingOptions options;
  Shape shape;
  bool whole_raw;  // raw has the passive channels, too
  size_t offset;   // elements by which the tensors miss a 16-byte boundary
  bool repeat;

  std::string name() const {
    const CouplingOptions& o = options;
    const std::string parts[] = {
        "map " + std::to_string(int(o.map)), "layout " + std::to_string(int(o.layout)),
        "form " + std::to_string(int(o.form)), "set " + std::to_string(int(o.active)),
        "block " + std::to_string(o.block), "parity " + std::to_string(o.parity), o.inverse ? "inverse" : "forward",
        whole_raw ? "whole raw" : "compact raw", "offset " + std::to_string(offset)};
    std::string text = "(" + std::to_string(shape.samples) + ", " + std::to_string(shape.channels) + ", " +
                       std::to_string(shape.height) + ", " + std::to_string(shape.width) +
                       (shape.channels_last ? ") channels last" : ")");
    for (const std::string& part : parts) text += ", " + part;
    return text + ": ";
  }
};

template <class S>
S rounded(double value) {
  return static_cast<S>(static_cast<std::conditional_t<std::is_same_v<S, double>, double, float>>(value));
}

template <class S>
std::vector<S> random(int64_t n, unsigned seed, double scale = 1) {
  std::minstd_rand generator(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<S> values(n);
  for (S& value : values) value = rounded<S>(normal(generator));
  return values;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// ---- What a coupling is, in double ----

double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

// log a(s) and its derivative.
void log_scale_of(ScaleMap map, double s, double c, double& value, double& derivative) {
  const double sigma = sigmoid(s + 2), tanh = std::tanh(s), soft = std::tanh(s / c);
  switch (map) {
    case ScaleMap::none: value = derivative = 0; break;
    case ScaleMap::exp: value = s, derivative = 1; break;
    case ScaleMap::exp_clip: value = std::fmin(std::fmax(s, -c), c), derivative = std::fabs(s) <= c; break;
    case ScaleMap::exp_tanh: value = tanh, derivative = 1 - tanh * tanh; break;
    case ScaleMap::sigmoid: value = std::log(sigma), derivative = 1 - sigma; break;
    case ScaleMap::sigmoid_inverse: value = -std::log(sigma), derivative = sigma - 1; break;
    case ScaleMap::sigmoid_floor:
      value = std::log(sigma + 1e-3), derivative = sigma * (1 - sigma) / (sigma + 1e-3);
      break;
    case ScaleMap::atan: value = 0.636 * c * std::atan(s), derivative = 0.636 * c / (1 + s * s); break;
    case ScaleMap::tanh: value = c * soft, derivative = 1 - soft * soft; break;
  }
  if (std::isnan(s) && map != ScaleMap::none) value = s;
}

struct Expected {
  double y, log_scale, grad_x, grad_s, grad_t;
  double magnitude;  // of the terms that make y and the gradients
};

Expected expected_of(const CouplingOptions& o, double x, double s, double t, double g, double grad_log_det) {
  double log_a, derivative;
  log_scale_of(o.map, s, o.clamp, log_a, derivative);
  const double slope = std::fabs(t) <= o.shift_clamp;  // of the clipped shift
  if (!std::isnan(t)) t = std::fmin(std::fmax(t, -o.shift_clamp), o.shift_clamp);
  const double a = std::exp(log_a), b = std::exp(-log_a), sign = o.form == Form::subtract_scale ? -1 : 1;
  Expected e;
  double by_log_a, by_t;  // derivatives of y
  if (o.form == Form::scale_shift && !o.inverse) {
    e.y = a * x + t, by_log_a = a * x, by_t = 1;
  } else if (o.form == Form::scale_shift) {
    e.y = (x - t) * b, by_log_a = -(x - t) * b, by_t = -b;
  } else if (!o.inverse) {
    e.y = (x + sign * t) * a, by_log_a = (x + sign * t) * a, by_t = sign * a;
  } else {
    e.y = x * b - sign * t, by_log_a = -x * b, by_t = -sign;
  }
  e.log_scale = o.inverse ? -log_a : log_a;
  e.grad_x = g * (o.inverse ? b : a);
  e.grad_s = (g * by_log_a + (o.inverse ? -1 : 1) * grad_log_det) * derivative;
  e.grad_t = g * by_t * slope;
  const double largest = std::fmax(a, b);
  e.magnitude = (1 + std::fabs(g)) * (1 + std::fabs(log_a)) * (1 + largest * (1 + std::fabs(x) + std::fabs(t))) +
                std::fabs(grad_log_det);
  return e;
}

bool active_at(const CouplingOptions& o, const Shape& shape, int64_t c, int64_t i, int64_t j) {
  switch (o.active) {
    case ActiveSet::all: return true;
    case ActiveSet::channels: return c >= shape.channels / 2;
    case ActiveSet::channels_ceil: return c >= shape.channels - shape.channels / 2;
    case ActiveSet::checkerboard: return (i / o.block + j / o.block) % 2 == o.parity;
    case ActiveSet::columns: return (j >= shape.width / 2) == (o.parity == 1);
    case ActiveSet::rows: return (i >= shape.height / 2) == (o.parity == 1);
  }
  return false;
}

// ---- One case ----

template <class S, class R>
void test_case(const Case& given, double epsilon) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const CouplingOptions& o = given.options;
  const Shape& shape = given.shape;
  const std::string name = given.name();
  const bool scales = o.map != ScaleMap::none;
  const bool interleaved = o.layout == Layout::interleaved || o.layout == Layout::interleaved_shift_first;
  const bool shift_first = o.layout == Layout::halves_shift_first || o.layout == Layout::interleaved_shift_first;
  const int64_t channels = shape.channels, pixels = shape.pixels(), n = shape.total();
  int64_t passive = 0;
  while (o.active <= ActiveSet::channels_ceil && passive < channels && !active_at(o, shape, passive, 0, 0)) ++passive;
  const int64_t skipped = given.whole_raw ? 0 : passive, covered = channels - skipped;
  const int64_t raw_channels = covered * (scales ? 2 : 1), raw_n = shape.samples * raw_channels * pixels;
  const auto at = [&](int64_t b, int64_t c, int64_t p, int64_t of) {
    return shape.channels_last ? (b * pixels + p) * of + c : (b * of + c) * pixels + p;
  };

  std::vector<S> x = random<S>(n, 1), grad_y = random<S>(n, 2);
  std::vector<R> raw = random<R>(raw_n, 3, 1.5);
  const std::vector<T> grad_log_det = random<T>(shape.samples, 4);
  std::vector<double> y(n), grad_x(n), x_magnitude(n, 1), grad_raw(raw_n), raw_magnitude(raw_n, 1);
  std::vector<double> log_det(shape.samples), log_magnitude(shape.samples, 1);
  for (int64_t b = 0; b < shape.samples; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t e = at(b, c, p, channels), k = c - skipped;
        int64_t s_channel = interleaved ? 2 * k : k, t_channel = interleaved ? 2 * k + 1 : covered + k;
        if (shift_first) std::swap(s_channel, t_channel);
        if (!scales) t_channel = k;
        const int64_t s_at = at(b, s_channel, p, raw_channels), t_at = at(b, t_channel, p, raw_channels);
        if (!active_at(o, shape, c, p / shape.width, p % shape.width)) {
          y[e] = as_double(x[e]), grad_x[e] = as_double(grad_y[e]);
          if (k < 0) continue;
          raw[t_at] = rounded<R>(NAN);
          if (scales) raw[s_at] = rounded<R>(NAN);
          continue;
        }
        const Expected expected = expected_of(o, as_double(x[e]), scales ? as_double(raw[s_at]) : 0,
                                              as_double(raw[t_at]), as_double(grad_y[e]), double(grad_log_det[b]));
        y[e] = expected.y, grad_x[e] = expected.grad_x, x_magnitude[e] = expected.magnitude;
        grad_raw[t_at] = expected.grad_t, raw_magnitude[t_at] = expected.magnitude;
        if (scales) grad_raw[s_at] = expected.grad_s, raw_magnitude[s_at] = expected.magnitude;
        log_det[b] += expected.log_scale, log_magnitude[b] += std::fabs(expected.log_scale);
      }
    }
  }

  const CouplingGeometry geometry(o, channels, raw_channels, shape.height, shape.width);
  const CouplingMemory memory(geometry, shape.samples, shape.channels_last);
  const test::Buffer<S> x_device(x, given.offset), grad_device(grad_y, given.offset);
  const test::Buffer<R> raw_device(raw, given.offset);
  const test::Buffer<T> grad_log_det_device(grad_log_det);
  std::vector<S> first_y, first_grad_x;
  std::vector<R> first_grad_raw;
  std::vector<T> first_log_det;
  for (int run = 0; run < (given.repeat ? 2 : 1); ++run) {
    test::Buffer<S> y_device(n, given.offset), grad_x_device(n, given.offset);
    test::Buffer<R> grad_raw_device(raw_n, given.offset);
    test::Buffer<T> log_det_device(shape.samples);
    test::Buffer<double> partial(hflow::cuda::coupling_partial_size<S>(memory));
    test::require(hflow::cuda::coupling_forward(x_device.data(), raw_device.data(), y_device.data(),
                                                log_det_device.data(), partial.data(), memory, o, cudaStream_t{}),
                  "forward");
    test::require(hflow::cuda::coupling_backward(x_device.data(), raw_device.data(), grad_device.data(),
                                                 grad_log_det_device.data(), grad_x_device.data(),
                                                 grad_raw_device.data(), memory, o, cudaStream_t{}),
                  "backward");
    const std::vector<S> got_y = y_device.read(), got_grad_x = grad_x_device.read();
    const std::vector<R> got_grad_raw = grad_raw_device.read();
    const std::vector<T> got_log_det = log_det_device.read();
    partial.read();
    if (run == 1) {
      if (same_bits(got_y, first_y) && same_bits(got_grad_x, first_grad_x) &&
          same_bits(got_grad_raw, first_grad_raw) && same_bits(got_log_det, first_log_det))
        continue;
      ++test::failures;
      std::printf("FAILED %s: a second run gave other bits\n", name.c_str());
      continue;
    }
    first_y = got_y, first_grad_x = got_grad_x, first_grad_raw = got_grad_raw, first_log_det = got_log_det;
    const double raw_epsilon = std::is_same_v<R, S> ? epsilon : 5e-3;
    const std::string y_name = name + "y", x_name = name + "grad_x", raw_name = name + "grad_raw";
    for (int64_t e = 0; e < n; ++e) {
      const double m = x_magnitude[e];
      test::expect_close(y_name, as_double(got_y[e]) / m, y[e] / m, epsilon);
      test::expect_close(x_name, as_double(got_grad_x[e]) / m, grad_x[e] / m, epsilon);
    }
    for (int64_t e = 0; e < raw_n; ++e) {
      const double m = raw_magnitude[e];
      test::expect_close(raw_name, as_double(got_grad_raw[e]) / m, grad_raw[e] / m, raw_epsilon);
    }
    for (int64_t b = 0; b < shape.samples; ++b) {
      const double m = log_magnitude[b];
      test::expect_close(name + "log_det", double(got_log_det[b]) / m, log_det[b] / m,
                         std::is_same_v<T, double> ? 1e-14 : 5e-7);
    }
  }
}

constexpr double kFloat = 5e-7;

CouplingOptions options_of(int map, int layout, int form, int set, bool inverse) {
  // Block and parity go round with the others: every pair occurs.
  const int turn = map + layout + 2 * form + inverse;
  return {ScaleMap(map),  1.25,       turn % 3 ? 1.5 : INFINITY, Layout(layout), Form(form),
          ActiveSet(set), 1 << turn % 4, (map + form) % 2,      inverse};
}

// Every map, layout, form, active set, direction and memory format, on sizes that vectors divide and on others.
void test_options() {
  const Shape shapes[] = {{2, 8, 4, 6, false}, {2, 8, 3, 4, true}, {3, 5, 3, 5, false}, {2, 3, 4, 9, true}};
  int turn = 0;
  for (int map = 0; map < hflow::kScaleMaps; ++map)
    for (int layout = 0; layout < 4; ++layout)
      for (int form = 0; form < 3; ++form)
        for (int set = 0; set < 6; ++set)
          for (bool inverse : {false, true})
            for (int odd : {0, 2})
              test_case<float, float>({options_of(map, layout, form, set, inverse), shapes[odd + turn++ % 2],
                                       turn % 3 != 0, 0, false},
                                      kFloat);
}

template <class S, class R>
void test_types(double epsilon) {
  const Shape shapes[] = {
      {2, 16, 4, 10, false},  {2, 16, 3, 5, true},    // vectors in both formats, across image rows
      {2, 3, 5, 7, false},    {3, 6, 4, 5, true},     // elements
      {2, 32, 1, 1, false},   {300, 1, 1, 1, true},   // (B, C); one lane per sample, more than a block of them
      {2, 4, 1, 23, false},                           // (B, C, L)
      {2, 8, 16, 24, false},  {1, 17, 13, 11, true},  // a block per sample
      {2, 12, 30, 32, false}, {1, 10, 31, 29, true},  // several blocks per sample
      {0, 3, 4, 4, false},    {2, 0, 4, 4, false},    {2, 3, 0, 4, true},
  };
  int turn = 0;
  for (const Shape& shape : shapes) {
    for (int set = 0; set < 6; ++set, ++turn) {
      const CouplingOptions options = options_of(1 + turn % (hflow::kScaleMaps - 1), turn % 4, turn % 3, set, turn % 2);
      test_case<S, R>({options, shape, turn % 5 < 3, 0, set < 3}, epsilon);
    }
    test_case<S, R>({options_of(turn % hflow::kScaleMaps, turn % 4, turn % 3, turn % 6, false), shape, true, 1, true},
                    epsilon);
  }
  test_case<S, R>({options_of(0, 0, 0, 0, false), {2, 12, 30, 32, false}, true, 0, true}, epsilon);
}

// The boundary of a clip is inside; Inf is clipped; NaN spoils its element and its sample's log-det only.
void test_special_values() {
  const Shape shape{2, 2, 2, 4, false};
  const int64_t n = shape.total();
  const CouplingOptions options{
      ScaleMap::exp_clip, 2, 3, Layout::halves, Form::scale_shift, ActiveSet::all, 1, 0, false};
  const CouplingMemory memory(CouplingGeometry(options, 2, 4, 2, 4), shape.samples, false);
  std::vector<float> x(n, 1), raw(2 * n, 0), ones(n, 1), grad_log_det(2, 1);
  float *s = raw.data(), *t = raw.data() + 16;  // of the first sample
  s[0] = 2, s[1] = std::nextafter(2.0f, 3.0f), s[2] = -INFINITY, s[3] = NAN;
  t[4] = 3, t[5] = INFINITY, t[6] = NAN;
  x[7] = INFINITY, x[8] = NAN;
  const test::Buffer<float> x_device(x), raw_device(raw), grad_device(ones), grad_log_det_device(grad_log_det);
  test::Buffer<float> y_device(n), grad_x_device(n), grad_raw_device(2 * n), log_det_device(2);
  test::require(hflow::cuda::coupling_forward(x_device.data(), raw_device.data(), y_device.data(),
                                              log_det_device.data(), static_cast<double*>(nullptr), memory, options,
                                              cudaStream_t{}),
                "forward");
  test::require(hflow::cuda::coupling_backward(x_device.data(), raw_device.data(), grad_device.data(),
                                               grad_log_det_device.data(), grad_x_device.data(),
                                               grad_raw_device.data(), memory, options, cudaStream_t{}),
                "backward");
  const std::vector<float> y = y_device.read(), grad_raw = grad_raw_device.read(), log_det = log_det_device.read();
  const std::vector<float> grad_x = grad_x_device.read();
  const double e2 = std::exp(2.0);
  const double expected_y[] = {e2, e2, 1 / e2, NAN, 4, 4, NAN, INFINITY, NAN, 1};
  for (int i = 0; i < 10; ++i) test::expect_close("special y " + std::to_string(i), y[i], expected_y[i], 1e-6);
  const double expected_s[] = {e2 + 1, 0, 0, NAN, 2, 2, 2, INFINITY, NAN, 2};
  for (int i = 0; i < 10; ++i) test::expect_close("special s " + std::to_string(i), grad_raw[i], expected_s[i], 1e-6);
  const double expected_t[] = {1, 1, 1, 1, 1, 0};
  for (int i = 0; i < 6; ++i) test::expect_close("special t " + std::to_string(i), grad_raw[16 + i], expected_t[i], 0);
  test::expect_close("special grad_x", grad_x[0], e2, 1e-6);
  test::expect_close("log_det with NaN", log_det[0], NAN, 0);
  test::expect_close("log_det of the other sample", log_det[1], 0, 0);
}

// Chunks cover a sample once, whatever its size.
void test_blocks() {
  using Blocks = hflow::cuda::CouplingBlocks;
  std::minstd_rand generator(5);
  for (int i = 0; i < 2000; ++i) {
    const int64_t sample = i == 0 ? 0 : int64_t(std::exp2(generator() % 3400 / 100.0)), samples = 1 << generator() % 12;
    const int vector = 2 << i % 3;
    const Blocks blocks(samples, sample, vector);
    const bool covered = blocks.chunks * blocks.chunk >= sample &&
                         (blocks.chunks - 1) * blocks.chunk < std::max<int64_t>(sample, 1);
    const bool whole_turns = blocks.chunks == 1 || blocks.chunk % (hflow::cuda::kThreads * vector) == 0;
    const bool all = blocks.blocks(samples) * blocks.groups() >= samples * blocks.chunks;
    if (covered && whole_turns && all && blocks.chunks <= Blocks::kMostChunks) continue;
    ++test::failures;
    std::printf("FAILED: %lld samples of %lld elements in %lld chunks of %lld\n", static_cast<long long>(samples),
                static_cast<long long>(sample), static_cast<long long>(blocks.chunks),
                static_cast<long long>(blocks.chunk));
  }
}

void test_divisor() {
  std::mt19937_64 generator(6);
  const auto any = [&] { return static_cast<int64_t>(generator() >> (1 + generator() % 63)); };
  for (int i = 0; i < 100000; ++i) {
    const int64_t d = std::max<int64_t>(1, any()), n = i % 2 ? any() : std::max<int64_t>(0, any() / d * d - i / 2 % 2);
    if (hflow::Divisor(d).divide(n) == n / d) continue;
    ++test::failures;
    std::printf("FAILED: %lld / %lld\n", static_cast<long long>(n), static_cast<long long>(d));
  }
}

}  // namespace

int main() {
  test::skip_without_gpu();
  test_divisor();
  test_blocks();
  test_special_values();
  test_options();
  test_types<float, float>(kFloat);
  test_types<double, double>(2e-15);
  test_types<__nv_bfloat16, __nv_bfloat16>(5e-3);
  test_types<__half, __half>(6e-4);
  test_types<float, __nv_bfloat16>(kFloat);
  test_types<float, __half>(kFloat);
  return test::report();
}
