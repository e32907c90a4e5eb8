// CPU kernels of cross-attention on raw pointers; strides count elements. Sums are double for double, else float.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/isa.h"
#include "cpu/cross_attn/attention_layout.h"

namespace vidmem {

struct AttendQueries {
  AttentionRows q, k, v;
  const void* bias;  // of every key, in the type of sums; null: none
  AttentionWindow window;
  double scale;
  const int32_t* keys;  // the keys that some query of the group sees, ascending; the window is applied again
  int64_t num_keys;
  int64_t first, count;  // queries of the group
  void* out;             // (Lq, Dv), out_stride from row to row
  DType out_dtype;
  int64_t out_stride;
  void* lse;  // (Lq,) in the type of sums
  void* scratch;
};

// Bytes of scratch of a group of `rows` queries, a multiple of kAttentionLanes, if sums have `size` bytes.
constexpr int64_t attend_scratch(int64_t rows, int64_t channels, int64_t value_channels, int64_t size) {
  const int64_t value_row = value_channels + kChannelPad, longest = channels > value_row ? channels : value_row;
  return (rows * (channels + value_row + 2) + kAttentionTile * (channels + 2 * value_row + kAttentionLanes + 1) + longest +
          2 * kAttentionLanes) * size + rows * 32 + 4096;
}

VIDMEM_DECLARE_KERNEL(attend_queries, void(const AttendQueries&))

}  // namespace vidmem
