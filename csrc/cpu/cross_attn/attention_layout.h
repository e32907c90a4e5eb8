// What callers of the attention kernels must know of tiles; the same for every instruction set.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace vidmem {

constexpr int64_t kAttentionTile = 96;   // keys (backward: queries) of a tile, whole panels of every instruction set
constexpr int64_t kAttentionLanes = 32;  // a multiple of the rows of a pack of every instruction set
constexpr int64_t kChannelPad = 32;      // channels of scratch rows: whole panels and packs, at most so many more

struct AttentionRows {  // the queries, keys or values of one batch element and head
  const void* data;
  DType dtype;
  int64_t row_stride, channel_stride, channels;
  const float* scales = nullptr;  // a factor of every row, for rows of 8 bits
  int64_t scale_stride = 0;
};

// Which pairs see each other, blocks aside: keys below num_sinks, and low[query] <= time[key] <= high[query]. Times of
// every type are integers in the same order here, so that no comparison rounds.
struct AttentionWindow {
  const int64_t *low, *high;  // null: no window
  const int64_t* time;
  int64_t num_sinks;

  bool sees(int64_t query, int64_t key) const {
    return key < num_sinks || (low[query] <= time[key] && time[key] <= high[query]);
  }
};

}  // namespace vidmem
