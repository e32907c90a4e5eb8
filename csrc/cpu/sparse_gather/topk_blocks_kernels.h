// CPU kernels of topk_blocks on raw pointers; strides count elements. Scores are double for double, else float.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/layout.h"
#include "cpu/common/score_layout.h"

namespace vidmem {

struct MeanBlocks {
  HeadRows x;  // (B, L, H, D)
  DType dtype;
  int64_t length, heads, channels, block, num_blocks;
  void* scratch;  // one padded row
  void* means;    // (B, H, blocks, D)
};

struct ScoreRows {  // queries or keys of one batch element and head
  const void* data;
  DType dtype;
  int64_t row_stride, channel_stride, channels, count;
};

struct PackKeys {
  ScoreRows keys;
  void* panels;
  void* scratch;  // kPanelColumns padded rows
};

struct TopkBlocks {
  ScoreRows queries;
  const void* panels;
  int64_t num_keys;
  int64_t topk;    // at most num_keys, not 0
  int64_t group;   // queries packed at a time, a multiple of kTileRows
  void* scratch;   // kPanelColumns padded rows, group x (channels + 1 + 2 * (topk + kRowPad))
  int32_t* index;  // (queries, topk)
};

VIDMEM_DECLARE_KERNEL(mean_blocks, void(const MeanBlocks&, int64_t, int64_t))  // (B, blocks)
VIDMEM_DECLARE_KERNEL(pack_keys, void(const PackKeys&, int64_t, int64_t))      // panels
VIDMEM_DECLARE_KERNEL(topk_blocks, void(const TopkBlocks&, int64_t, int64_t))  // queries

}  // namespace vidmem
