// CPU kernels of sparse gathering on raw pointers; strides count elements.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/layout.h"
#include "cpu/common/index_view.h"

namespace vidmem {

struct GatherRows {
  Rows bank;  // batch_stride 0: one bank for the whole batch
  DType bank_dtype;
  Matrix scale;     // float; null for float banks
  IndexView index;  // (B, K), -1: zero row
  void* out;        // (B, K, C) contiguous
  DType out_dtype;
  int64_t rows_per_batch, channels;
};

struct SumRows {
  Rows src;
  DType dtype;
  const int64_t* order;    // (B, K) source rows, grouped by output row
  const int64_t* offsets;  // (B, M + 2); the last entry is not an offset
  void* out;               // (B, M, C) contiguous
  int64_t source_rows, output_rows, channels;
};

// Rows [begin, end) of the flattened (B, K) output.
VIDMEM_DECLARE_KERNEL(gather_rows, void(const GatherRows&, int64_t begin, int64_t end))

// Channels [first, last) of the rows [begin, end) of the flattened (B, M) output.
VIDMEM_DECLARE_KERNEL(sum_rows, void(const SumRows&, int64_t begin, int64_t end, int64_t first, int64_t last))

}  // namespace vidmem
