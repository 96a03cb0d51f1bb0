// How the elements of x meet parameters per channel, for the elementwise ops (actnorm.cpp, bias_act.cpp).
//
// Long channel rows (contiguous) are worked on one by one. Short rows and channels_last, where the channel changes from
// element to element, are walked in a pattern of channels that repeats every sample or pixel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/tensor.h"

namespace hflow {

inline constexpr int64_t kTile = 1024;         // elements converted at a time: buffers stay in L1
inline constexpr int64_t kChunk = 16 * kTile;  // elements per unit of work
inline constexpr int64_t kLongRow = 64;        // rows at least this long are worth a call of their own

struct ChannelPlan {
  int64_t channels, run, total;  // `run` consecutive elements share a channel
  bool by_rows;

  ChannelPlan(const Tensor& x, MemoryFormat format)
      : channels(x.size(1)),
        run(format == MemoryFormat::ChannelsLast ? 1 : pixels_of(x)),
        total(x.numel()),
        by_rows(run >= kLongRow) {}

  int64_t period() const { return run * channels; }
  int64_t chunks_per_row() const { return (run + kChunk - 1) / kChunk; }
  // The pattern repeats whole periods up to about a tile, so that short periods still fill vectors.
  int64_t pattern() const { return period() * std::max<int64_t>(1, kTile / std::max<int64_t>(period(), 1)); }
  int64_t pattern_chunk() const { return pattern() * std::max<int64_t>(1, kChunk / std::max<int64_t>(pattern(), 1)); }

  int64_t row_units() const { return total / run * chunks_per_row(); }
  int64_t pattern_units() const { return (total + pattern_chunk() - 1) / pattern_chunk(); }

  // The channel of all elements of a row unit, and of element e of the pattern.
  int64_t channel_of_unit(int64_t unit) const { return unit / chunks_per_row() % channels; }
  int64_t channel_of_element(int64_t e) const { return e / run % channels; }

  // f(channel, offset, n) for the tiles of one (row, chunk) unit.
  template <class F>
  void for_row_tiles(int64_t unit, const F& f) const {
    const int64_t row = unit / chunks_per_row(), begin = (unit % chunks_per_row()) * kChunk;
    const int64_t end = std::min(begin + kChunk, run);
    for (int64_t p = begin; p < end; p += kTile) f(row % channels, row * run + p, std::min(kTile, end - p));
  }

  // f(pattern_offset, offset, n) for the tiles of one pattern unit.
  template <class F>
  void for_pattern_tiles(int64_t unit, const F& f) const {
    const int64_t end = std::min((unit + 1) * pattern_chunk(), total);
    for (int64_t base = unit * pattern_chunk(); base < end; base += pattern()) {
      const int64_t stop = std::min(base + pattern(), end);
      for (int64_t e = base; e < stop; e += kTile) f(e - base, e, std::min(kTile, stop - e));
    }
  }
};

}  // namespace hflow
