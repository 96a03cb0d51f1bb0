// Winograd's minimal filtering F(4×4, 3×3) in vectors of channels: transforms of tiles.
//
// A tile of 4 × 4 outputs reads 6 × 6 inputs. At 36 points, the products of 36 transformed inputs with 36 transformed
// weights replace 144 multiplications (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016;
// interpolation at 0, ±1, ±2 and ∞). Images are (sample, row, column, channel); transformed ones (point, tile,
// channel), with the tile's channels padded.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace hflow::winograd {

inline constexpr int64_t kTile = 4, kReach = 6, kTaps = 3, kPoints = kReach * kReach;

// Floats between a point's rows and the next one's. Powers of two would send all 36 to the same lines of the cache.
inline constexpr int64_t spread(int64_t floats) { return floats + 5 * kWidest; }

// An image, or some of its channels: pixels are `stride` floats apart. Tiles are counted through all samples.
struct Image {
  int64_t height, width, channels, stride;

  int64_t tiles_per_row() const { return (width + kTile - 1) / kTile; }
  int64_t tiles() const { return (height + kTile - 1) / kTile * tiles_per_row(); }
};

// Where a tile begins.
struct Corner {
  int64_t sample, row, column;

  Corner(const Image& image, int64_t tile)
      : sample(tile / image.tiles()),
        row(tile % image.tiles() / image.tiles_per_row() * kTile),
        column(tile % image.tiles_per_row() * kTile) {}
};

// One direction of a transform: `to` values from `from`. Two make a tile's.
struct InputMap {
  static constexpr int from = kReach, to = kReach;
  template <class V>
  HFLOW_LEAF void run(const V* d, V* v) {
    const V even = d[4] - 4.f * d[2], odd = d[3] - 4.f * d[1], far_even = d[4] - d[2], far_odd = 2.f * (d[3] - d[1]);
    v[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    v[1] = even + odd, v[2] = even - odd;
    v[3] = far_even + far_odd, v[4] = far_even - far_odd;
    v[5] = 4.f * d[1] - 5.f * d[3] + d[5];
  }
};

struct OutputMap {
  static constexpr int from = kReach, to = kTile;
  template <class V>
  HFLOW_LEAF void run(const V* m, V* y) {
    const V near_sum = m[1] + m[2], near = m[1] - m[2], far_sum = m[3] + m[4], far = m[3] - m[4];
    y[0] = m[0] + near_sum + far_sum;
    y[1] = near + 2.f * far;
    y[2] = near_sum + 4.f * far_sum;
    y[3] = near + 8.f * far + m[5];
  }
};

struct WeightMap {
  static constexpr int from = kTaps, to = kReach;
  template <class V>
  HFLOW_LEAF void run(const V* g, V* u) {
    const V near = (g[0] + g[2]) * (-1.f / 6), near_odd = g[1] * (1.f / 6);
    const V far = g[0] * (1.f / 24) + g[2] * (1.f / 6), far_odd = g[1] * (1.f / 12);
    u[0] = g[0] * (1.f / 4);
    u[1] = near - near_odd, u[2] = near + near_odd;
    u[3] = far + far_odd, u[4] = far - far_odd;
    u[5] = g[2];
  }
};

// The transposes of the last two, for the weights' gradient.
struct OutputGradientMap {
  static constexpr int from = kTile, to = kReach;
  template <class V>
  HFLOW_LEAF void run(const V* y, V* m) {
    const V even = y[0] + y[2], odd = y[1] + y[3], far_even = y[0] + 4.f * y[2], far_odd = 2.f * y[1] + 8.f * y[3];
    m[0] = y[0];
    m[1] = even + odd, m[2] = even - odd;
    m[3] = far_even + far_odd, m[4] = far_even - far_odd;
    m[5] = y[3];
  }
};
inline constexpr int64_t kSumPoint = kReach + 1;  // where a transformed gradient of the output is the sum of its tile

struct WeightGradientMap {
  static constexpr int from = kReach, to = kTaps;
  template <class V>
  HFLOW_LEAF void run(const V* u, V* g) {
    const V near = u[1] + u[2], far = u[3] + u[4];
    g[0] = u[0] * (1.f / 4) - near * (1.f / 6) + far * (1.f / 24);
    g[1] = (u[2] - u[1]) * (1.f / 6) + (u[3] - u[4]) * (1.f / 12);
    g[2] = (far - near) * (1.f / 6) + u[5];
  }
};

// A vector of channels of a whole tile: read(row, column, value) → write(row, column, transformed value).
template <class Map, class V, class Read, class Write>
HFLOW_LEAF void transform(const Read& read, const Write& write) {
  V between[Map::to][Map::from];
  for (int column = 0; column < Map::from; ++column) {
    V in[Map::from], out[Map::to];
    for (int row = 0; row < Map::from; ++row) read(row, column, in[row]);
    Map::run(in, out);
    for (int row = 0; row < Map::to; ++row) between[row][column] = out[row];
  }
  for (int row = 0; row < Map::to; ++row) {
    V out[Map::to];
    Map::run(between[row], out);
    for (int column = 0; column < Map::to; ++column) write(row, column, out[column]);
  }
}

// Tiles [first, last) of an image, which reach Border pixels beyond their outputs, to all points: rows `row_floats`
// apart, points `point_floats`. What lies outside the image reads `zeros`.
template <class Map, int64_t Border>
struct ToPoints {
  template <int Bytes>
  struct Wide {
    using L = Lanes<Bytes>;
    using V = typename L::Vector;

    HFLOW_LEAF void run(const float* x, Image image, int64_t first, int64_t last, const float* zeros, float* points,
                        int64_t row_floats, int64_t point_floats) {
      for (int64_t tile = first; tile < last; ++tile, points += row_floats) {
        const Corner corner(image, tile);
        const float* pixels[Map::from][Map::from];
        for (int64_t i = 0; i < Map::from; ++i) {
          const int64_t row = corner.row - Border + i, column = corner.column - Border;
          const bool is_row = row >= 0 && row < image.height;
          int64_t pixel = ((corner.sample * image.height + row) * image.width + column) * image.stride;
          for (int64_t j = 0; j < Map::from; ++j, pixel += image.stride)
            pixels[i][j] = is_row && column + j >= 0 && column + j < image.width ? x + pixel : zeros;
        }
        for (int64_t c = 0; c < image.channels; c += L::kWidth)
          transform<Map, V>(
              [&](int row, int column, V& value) __attribute__((always_inline)) {
                value = L::load(pixels[row][column] + c, image.channels - c);
              },
              [&](int row, int column, V value) __attribute__((always_inline)) {
                L::store(points + (row * kReach + column) * point_floats + c, value);
              });
      }
    }
  };
};

// The outputs of tiles [first, last) from all points, plus a bias.
template <int Bytes>
struct ToOutputs {
  using L = Lanes<Bytes>;
  using V = typename L::Vector;

  HFLOW_LEAF void run(const float* points, int64_t first, int64_t last, const float* bias, Image image, float* y) {
    const int64_t row_floats = padded(image.channels), point_floats = spread((last - first) * row_floats);
    for (int64_t tile = first; tile < last; ++tile, points += row_floats) {
      const Corner corner(image, tile);
      const int64_t rows = image.height - corner.row, columns = image.width - corner.column;
      float* to = y + ((corner.sample * image.height + corner.row) * image.width + corner.column) * image.stride;
      for (int64_t c = 0; c < image.channels; c += L::kWidth) {
        const V shift = L::load(bias + c, image.channels - c);
        transform<OutputMap, V>(
            [&](int row, int column, V& value) __attribute__((always_inline)) {
              value = L::load(points + (row * kReach + column) * point_floats + c);
            },
            [&](int row, int column, V value) __attribute__((always_inline)) {
              if (row >= rows || column >= columns) return;
              L::store(to + (row * image.width + column) * image.stride + c, value + shift, image.channels - c);
            });
      }
    }
  }
};

// Nine taps of some outputs, `tap_floats` apart, to all points, `point_floats` apart.
template <int Bytes>
struct ToWeightPoints {
  using L = Lanes<Bytes>;
  using V = typename L::Vector;

  HFLOW_LEAF void run(const float* taps, int64_t tap_floats, int64_t outputs, float* points, int64_t point_floats) {
    for (int64_t o = 0; o < outputs; o += L::kWidth)
      transform<WeightMap, V>(
          [&](int row, int column, V& value) __attribute__((always_inline)) {
            value = L::load(taps + (row * kTaps + column) * tap_floats + o);
          },
          [&](int row, int column, V value) __attribute__((always_inline)) {
            L::store(points + (row * kReach + column) * point_floats + o, value);
          });
  }
};

// The taps of one output for all inputs, from their gradients at all points.
template <int Bytes>
struct ToTaps {
  using L = Lanes<Bytes>;
  using V = typename L::Vector;

  HFLOW_LEAF void run(const float* points, int64_t point_floats, int64_t channels, float* taps) {
    for (int64_t c = 0; c < channels; c += L::kWidth)
      transform<WeightGradientMap, V>(
          [&](int row, int column, V& value) __attribute__((always_inline)) {
            value = L::load(points + (row * kReach + column) * point_floats + c);
          },
          [&](int row, int column, V value) __attribute__((always_inline)) {
            L::store(taps + (row * kTaps + column) * channels + c, value, channels - c);
          });
  }
};

// sums[c] += Σ rows[i][c].
struct AddRows {
  HFLOW_LEAF void run(const float* rows, int64_t row_floats, int64_t count, int64_t channels, double* sums) {
    for (int64_t i = 0; i < count; ++i, rows += row_floats)
      for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(rows[c]);
  }
};

}  // namespace hflow::winograd
