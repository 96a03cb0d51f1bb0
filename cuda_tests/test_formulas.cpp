// csrc/formulas.h against the C library and finite differences, in double: every scale map's logarithm, scale in both
// directions and derivative; every coupling form's gradients; clips at, beyond and off their limits.
#include "formulas.h"

#include <limits>

#include "check.h"

namespace {

using namespace hflow;

constexpr double kStep = 1e-5;
constexpr double kDifference = 1e-8;  // central differences: step² of truncation, and rounding divided by the step
const char* const kNames[kScaleMaps] = {"none",          "exp",  "exp_clip", "exp_tanh", "sigmoid", "sigmoid_inverse",
                                        "sigmoid_floor", "atan", "tanh"};

// log a(s), straight from the definitions.
double expected_log_scale(ScaleMap map, double s, double clamp) {
  const double sigmoid = 1 / (1 + std::exp(-(s + 2)));
  switch (map) {
    case ScaleMap::none: return 0;
    case ScaleMap::exp: return s;
    case ScaleMap::exp_clip: return std::fmin(std::fmax(s, -clamp), clamp);
    case ScaleMap::exp_tanh: return std::tanh(s);
    case ScaleMap::sigmoid: return -std::log1p(std::exp(-(s + 2)));
    case ScaleMap::sigmoid_inverse: return std::log1p(std::exp(-(s + 2)));
    case ScaleMap::sigmoid_floor: return std::log(sigmoid + 1e-3);
    case ScaleMap::atan: return 0.636 * clamp * std::atan(s);
    case ScaleMap::tanh: return clamp * std::tanh(s / clamp);
  }
  return std::nan("");
}

template <class F>
double slope(const F& f, double at) {
  return (f(at + kStep) - f(at - kStep)) / (2 * kStep);
}

// A clip bends at its limits: there, differences mean nothing.
bool at_bend(double value, double limit) { return std::fabs(std::fabs(value) - limit) < 2 * kStep; }

template <class Map>
void test_map(ScaleMap map, double clamp) {
  const std::string name = kNames[static_cast<int>(map)];
  for (double s = -12; s <= 12; s += 0.0625) {
    const std::string at = name + " of s = " + std::to_string(s) + ", clamp " + std::to_string(clamp) + ": ";
    const double log_scale = expected_log_scale(map, s, clamp);
    test::expect_close(at + "log-scale", Map::log_scale(s, clamp), log_scale, 1e-14);
    test::expect_close(at + "scale", Map::scale(s, clamp, 1.0) / std::exp(log_scale), 1, 1e-13);
    test::expect_close(at + "inverse scale", Map::scale(s, clamp, -1.0) * std::exp(log_scale), 1, 1e-13);
    if (map == ScaleMap::exp_clip && at_bend(s, clamp)) continue;
    const double difference = slope([&](double v) { return expected_log_scale(map, v, clamp); }, s);
    test::expect_close(at + "derivative", Map::derivative(s, clamp), difference, kDifference);
    test::expect_close(at + "derivative in float32", Map::derivative(float(s), float(clamp)), difference, 1e-6);
  }
  const double nan = std::nan("");
  if (map != ScaleMap::none) test::expect_close(name + " of NaN", Map::scale(nan, clamp, 1.0), nan, 0);
}

// The loss grad_y·y + grad_log_det·log-scale, whose gradients couple_backward returns.
template <class Map, bool ShiftBefore>
void test_coupling(ScaleMap map, Form form, bool inverse) {
  const double grad_y = 1.3, grad_log_det = -0.7;
  const CouplingParameters<double> p(form, 1.5, 2.5, inverse);
  const auto loss = [&](double x, double s, double t) {
    double y, log_scale;
    couple<Map, ShiftBefore>(x, s, t, p, y, log_scale);
    return grad_y * y + grad_log_det * log_scale;
  };
  for (double x : {-1.1, 0.4}) {
    for (double s : {-4.0, -0.9, 0.3, 2.2}) {
      for (double t : {-3.0, -0.8, 1.9, 6.0}) {
        const std::string at = std::string(kNames[static_cast<int>(map)]) + ", form " +
                               std::to_string(static_cast<int>(form)) + (inverse ? ", inverse: " : ", forward: ");
        double y, again, log_scale, grad_x, grad_s, grad_t;
        couple<Map, ShiftBefore>(x, s, t, p, y, log_scale);
        couple_backward<Map, ShiftBefore>(x, s, t, grad_y, grad_log_det, p, again, grad_x, grad_s, grad_t);
        test::expect_close(at + "y again", again, y, 0);
        test::expect_close(at + "grad_x", grad_x, slope([&](double v) { return loss(v, s, t); }, x), kDifference);
        test::expect_close(at + "grad_s", grad_s, slope([&](double v) { return loss(x, v, t); }, s), kDifference);
        test::expect_close(at + "grad_t", grad_t, slope([&](double v) { return loss(x, s, v); }, t), kDifference);

        const double scale = std::exp(expected_log_scale(map, s, 1.5)), shift = std::fmin(std::fmax(t, -2.5), 2.5);
        const double forward =
            form == Form::scale_shift ? scale * x + shift : (form == Form::add_scale ? x + shift : x - shift) * scale;
        const double backward =
            form == Form::scale_shift ? (x - shift) / scale : x / scale + (form == Form::add_scale ? -shift : shift);
        test::expect_close(at + "y", y, inverse ? backward : forward, 1e-13);
      }
    }
  }
}

void test_clips() {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  test::expect_close("clip of NaN", clip(nan, 1.0), nan, 0);
  test::expect_close("clip of inf", clip(inf, 1.0), 1, 0);
  test::expect_close("clip to inf", clip(1e300, inf), 1e300, 0);
  test::expect_close("clip's derivative on its limit", clip_derivative(-1.0, 1.0), 1, 0);
  test::expect_close("clip's derivative beyond its limit", clip_derivative(1.0 + 1e-9, 1.0), 0, 0);
}

}  // namespace

int main() {
  for (int number = 0; number < kScaleMaps; ++number) {
    const auto map = static_cast<ScaleMap>(number);
    visit_scale_map(map, [&](auto tag) {
      using Map = decltype(tag);
      for (double clamp : {0.7, 3.0}) test_map<Map>(map, clamp);
      for (Form form : {Form::scale_shift, Form::add_scale, Form::subtract_scale}) {
        for (bool inverse : {false, true}) {
          if (shift_comes_before(form, inverse)) {
            test_coupling<Map, true>(map, form, inverse);
          } else {
            test_coupling<Map, false>(map, form, inverse);
          }
        }
      }
    });
  }
  test_clips();
  return test::report();
}
