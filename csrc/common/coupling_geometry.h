// The options of a coupling, which elements of x it transforms, and which channels of raw hold their scales and shifts.
// Host and device, free of torch.
#pragma once

#include "formulas.h"

namespace hflow {

enum class Layout : int { halves, halves_shift_first, interleaved, interleaved_shift_first };
enum class ActiveSet : int { all, channels, channels_ceil, checkerboard, columns, rows };

// As in the schemas; made from their arguments by coupling_options() of common/coupling_checks.h.
struct CouplingOptions {
  ScaleMap map;
  double clamp, shift_clamp;
  Layout layout;
  Form form;
  ActiveSet active;
  int64_t block, parity;
  bool inverse;

  bool scales() const { return map != ScaleMap::none; }  // raw holds scales besides shifts
  bool spatial() const {
    return active == ActiveSet::checkerboard || active == ActiveSet::columns || active == ActiveSet::rows;
  }
  bool interleaved() const {
    return scales() && (layout == Layout::interleaved || layout == Layout::interleaved_shift_first);
  }
  bool shift_first() const {
    return layout == Layout::halves_shift_first || layout == Layout::interleaved_shift_first;
  }
  int64_t raw_channels(int64_t active_channels) const { return (scales() ? 2 : 1) * active_channels; }
  int64_t passive_channels(int64_t channels) const {
    return active == ActiveSet::channels ? channels / 2 : active == ActiveSet::channels_ceil ? (channels + 1) / 2 : 0;
  }
};

struct CouplingGeometry {
  int64_t channels, height, width;   // of x; height = 1 for (B, C, L), both 1 for (B, C)
  int64_t passive;                   // the first channels, which pass through
  int64_t raw_channels;
  int64_t without_raw;               // the first channels, for which raw holds nothing: `passive` or 0
  int64_t raw_step;                  // between the scales (and the shifts) of neighbouring channels
  int64_t first_scale, first_shift;  // channels of raw that belong to channel `without_raw`
  ActiveSet set;
  bool scales, spatial;
  int block_shift, parity;

  // `raw_channels` must be one of the two numbers that coupling_geometry() accepts.
  CouplingGeometry(const CouplingOptions& options, int64_t channels, int64_t raw_channels, int64_t height,
                   int64_t width)
      : channels(channels),
        height(height),
        width(width),
        passive(options.passive_channels(channels)),
        raw_channels(raw_channels),
        without_raw(raw_channels == options.raw_channels(channels) ? 0 : passive),
        raw_step(options.interleaved() ? 2 : 1),
        first_scale(0),
        first_shift(0),
        set(options.active),
        scales(options.scales()),
        spatial(options.spatial()),
        block_shift(options.block == 8 ? 3 : options.block == 4 ? 2 : options.block == 2 ? 1 : 0),
        parity(static_cast<int>(options.parity)) {
    if (scales) (options.shift_first() ? first_scale : first_shift) = raw_step == 2 ? 1 : raw_channels / 2;
  }

  HFLOW_HD int64_t pixels() const { return height * width; }

  // Whether raw holds values for a channel; where it does, their channels. Without `scales` there is no scale.
  HFLOW_HD bool has_raw(int64_t channel) const { return channel >= without_raw; }
  HFLOW_HD int64_t scale_channel(int64_t channel) const { return first_scale + raw_step * (channel - without_raw); }
  HFLOW_HD int64_t shift_channel(int64_t channel) const { return first_shift + raw_step * (channel - without_raw); }
  HFLOW_HD bool ignores_raw() const { return without_raw < passive; }  // raw has passive channels

  // What an image's row and column add to the choice: with a spatial set, a pixel is active where the sum is odd or
  // even as `parity` is.
  HFLOW_HD int row_side(int64_t row) const {
    return set == ActiveSet::checkerboard ? static_cast<int>(row >> block_shift & 1)
           : set == ActiveSet::rows       ? row >= height / 2
                                          : 0;
  }
  HFLOW_HD int column_side(int64_t column) const {
    return set == ActiveSet::checkerboard ? static_cast<int>(column >> block_shift & 1)
           : set == ActiveSet::columns    ? column >= width / 2
                                          : 0;
  }
  HFLOW_HD bool active_pixel(int64_t row, int64_t column) const {
    return !spatial || ((row_side(row) + column_side(column)) & 1) == parity;
  }
  HFLOW_HD bool active_channel(int64_t channel) const { return channel >= passive; }
};

}  // namespace hflow
