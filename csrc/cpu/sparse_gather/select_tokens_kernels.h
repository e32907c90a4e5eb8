// CPU kernel of select_tokens on raw pointers; strides count elements.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/layout.h"

namespace vidmem {

struct RowNorms {
  Rows x;  // (B, N, C)
  DType dtype;
  void* out;  // (B, N) contiguous scores; float, or double for double
  int64_t rows_per_batch, channels;
};

// Scores in the order of the norms of the rows [begin, end) of the flattened (B, N), however large or small.
VIDMEM_DECLARE_KERNEL(row_norms, void(const RowNorms&, int64_t begin, int64_t end))

}  // namespace vidmem
