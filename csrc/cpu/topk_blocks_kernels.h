// CPU kernels of topk_blocks on raw pointers; strides count elements. Scores are double for double, else float.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/score_layout.h"

namespace vidmem {

struct BlockRows {  // blocks of rows of one batch element and head
  const void* data;
  DType dtype;
  int64_t row_stride, channel_stride, channels;
  int64_t length, block;
};

struct PackKeys {
  BlockRows keys;
  void* panels;   // means of blocks
  void* scratch;  // kPanelColumns + 1 padded rows
};

struct TopkBlocks {
  BlockRows queries;
  const void* panels;
  int64_t num_keys;  // blocks
  int64_t topk;      // at most num_keys, not 0
  int64_t group;     // blocks of queries that are packed at a time, a multiple of kTileRows
  void* scratch;     // kPanelColumns + 1 padded rows, group x (channels + 1 + 2 * topk)
  int32_t* index;    // (blocks of queries, topk)
};

VIDMEM_DECLARE_KERNEL(pack_keys, void(const PackKeys&, int64_t, int64_t))      // panels
VIDMEM_DECLARE_KERNEL(topk_blocks, void(const TopkBlocks&, int64_t, int64_t))  // blocks of queries

}  // namespace vidmem
