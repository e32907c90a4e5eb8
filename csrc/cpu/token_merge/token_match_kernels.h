// CPU kernels of token matching on raw pointers; strides count elements. Scores are double for double, else float.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/common/score_layout.h"

namespace vidmem {

struct RowsOf {
  const void* data;
  int64_t row_stride, channel_stride;
};

struct TokenRows {  // the tokens of one batch element: the rows of a memory, if any, then the others
  DType dtype;
  int64_t channels;
  RowsOf tokens, memory;
  int64_t memory_rows;
};

struct PackPanels {
  TokenRows rows;
  const int32_t* columns;  // position of the token of every column; -1: an empty column, which is never chosen
  void* panels;            // unit vectors
  void* scratch;           // kPanelColumns padded rows
};

struct MatchAll {
  TokenRows rows;
  const void* panels;
  int64_t num_panels;
  const int32_t* columns;  // of the panels, -1: none
  const int32_t* sources;  // positions
  int64_t group;           // sources packed at a time, a multiple of kTileRows
  void* scratch;           // kPanelColumns padded rows, group x (channels + 2)
  void* score;             // by position, of the sources; -infinity for one that sees no destination
  int32_t* destination;    // position, by position
};

struct MatchWindow {
  TokenRows rows;
  const void* panels;      // for every row of cells along w in turn, padded to whole panels
  const int32_t* columns;
  int64_t grid[3], stride[3];
  int64_t cells[3];  // cells that have a destination
  int64_t blocks[3];  // cells whose tokens see one; at most one more per axis, which the grid cuts
  int64_t window[3];  // < blocks
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
