// Tile sizes that callers of the attention kernels need; the same for every instruction set.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace vidmem {

constexpr int64_t kAttentionTile = 96;   // keys (backward: queries) of a tile, whole panels of every instruction set
constexpr int64_t kAttentionLanes = 32;  // a multiple of the rows of a pack of every instruction set
constexpr int64_t kChannelPad = 32;      // padding of scratch rows, in channels: whole panels and packs

struct AttentionRows {  // the queries, keys or values of one batch element and head
  const void* data;
  DType dtype;
  int64_t row_stride, channel_stride, channels;
  const float* scales = nullptr;  // one factor per row, for 8-bit rows
  int64_t scale_stride = 0;
};

// The visible pairs, apart from blocks: keys below num_sinks, and low[query] <= time[key] <= high[query]. Times of all
// types are converted to integers of the same order, so that no comparison rounds.
struct AttentionWindow {
  const int64_t *low, *high;  // null: no window
  const int64_t* time;
  int64_t num_sinks;

  bool sees(int64_t query, int64_t key) const {
    return key < num_sinks || (low[query] <= time[key] && time[key] <= high[query]);
  }
};

}  // namespace vidmem
