// CPU kernels of token matching on raw pointers; strides count elements. Scores are double for double, else float.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/common/score_layout.h"

namespace vidmem {

struct TokenRows {  // the tokens of one batch element
  const void* data;
  DType dtype;
  int64_t row_stride, channel_stride, channels;
};

struct PackPanels {
  TokenRows rows;
  const int32_t* columns;  // position of the token of every column, -1: none, a column that is never found
  void* panels;            // unit vectors
  void* scratch;           // kPanelColumns padded rows
};

struct MatchAll {
  TokenRows rows;
  const void* panels;
  int64_t num_panels;
  const int32_t* columns;
  const int32_t* sources;  // positions
  int64_t group;           // sources that are packed at a time, a multiple of kTileRows
  void* scratch;           // kPanelColumns padded rows, group x (channels + 2)
  void* score;             // by position, of the sources
  int32_t* destination;    // position, by position
};

struct MatchWindow {
  TokenRows rows;
  const void* panels;      // of every row of cells along w in turn, padded to whole panels
  const int32_t* columns;
  int64_t grid[3], stride[3], window[3], cells[3];  // window < cells
  int64_t cells_per_unit, units_per_row;
  void* scratch;  // kPanelColumns padded rows, kTileRows x channels
  void* score;
  int32_t* destination;
};

struct MatchNeighbors {
  TokenRows rows;
  int64_t grid[3];
  void* divisors;  // two per token: its largest magnitude, and its length once divided by that
  void* scratch;   // two padded rows
  void* score;     // by position, of the odd tokens
  int32_t* destination;
};

VIDMEM_DECLARE_KERNEL(pack_panels, void(const PackPanels&, int64_t, int64_t))          // panels
VIDMEM_DECLARE_KERNEL(match_all, void(const MatchAll&, int64_t, int64_t))              // sources
VIDMEM_DECLARE_KERNEL(match_window, void(const MatchWindow&, int64_t, int64_t))        // units of cells
VIDMEM_DECLARE_KERNEL(find_divisors, void(const MatchNeighbors&, int64_t, int64_t))    // tokens
VIDMEM_DECLARE_KERNEL(match_neighbors, void(const MatchNeighbors&, int64_t, int64_t))  // tokens

}  // namespace vidmem
