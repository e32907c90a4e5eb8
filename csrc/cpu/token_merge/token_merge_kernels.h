// CPU kernels of token merging on raw pointers; strides count elements.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/layout.h"

namespace vidmem {

struct Groups {
  Matrix assignment, order, offsets;
  bool wide;  // all int64, else all int32
  int64_t batch, tokens, rows;
};

struct MergeRows {
  Groups groups;
  Rows x;
  DType dtype;
  int64_t channels;
  bool is_mean;  // weighted by size, else a plain sum
  Matrix size;  // (B, N) float32, or float64 for float64 tokens; null if not given
  void* out;    // (B, M, C) contiguous
  void* total;  // (B, M) contiguous, if a mean
};

struct MergeBackward {
  Groups groups;
  Rows grad, x;
  bool wants_size;  // else x is not given
  bool has_dots;    // grad_size already holds <grad, x> of every token
  DType dtype;
  int64_t channels;
  Matrix size, grad_total;
  void* grad_x;     // (B, N, C) contiguous
  void* grad_size;  // (B, N) contiguous, if wanted
};

struct UnmergeRows {
  Groups groups;
  Rows y;
  int64_t element_size, channels;
  void* out;  // (B, N, C) contiguous
};

// Process the rows [begin, end) of the flattened (B, M), unmerge_rows the tokens of the flattened (B, N), and check
// their part of the plan: they return false if it is invalid. Nothing outside the tensors is accessed, but the results
// are then incomplete.
VIDMEM_DECLARE_KERNEL(merge_rows, bool(const MergeRows&, int64_t, int64_t))
VIDMEM_DECLARE_KERNEL(merge_backward, bool(const MergeBackward&, int64_t, int64_t))
VIDMEM_DECLARE_KERNEL(unmerge_rows, bool(const UnmergeRows&, int64_t, int64_t))

// float64 products grad * x of the tokens [begin, end) of a batch element, from `first` on in `out`; false if a token
// has no row.
VIDMEM_DECLARE_KERNEL(multiply_rows, bool(const MergeBackward&, int64_t, int64_t, int64_t, int64_t, double*))

}  // namespace vidmem
