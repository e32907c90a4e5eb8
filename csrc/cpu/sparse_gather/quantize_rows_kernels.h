// CPU kernels of quantize_rows on raw pointers; strides count elements.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/layout.h"

namespace vidmem {

struct QuantizeRows {
  Rows x;  // (B, M, C)
  DType dtype;
  void* rows;  // (B, M, C) contiguous
  DType rows_dtype;
  void* scale;  // (B, M) contiguous; float, or double for double
  int64_t rows_per_batch, channels;
};

struct QuantizeRowsBackward {
  Matrix grad_scale;  // (B, M) of the type of the scale
  Rows x;
  DType dtype;
  DType rows_dtype;
  void* grad;  // (B, M, C) contiguous, of the type of x
  int64_t rows_per_batch, channels;
};

// Rows [begin, end) of the flattened (B, M).
VIDMEM_DECLARE_KERNEL(encode_rows, void(const QuantizeRows&, int64_t begin, int64_t end))
VIDMEM_DECLARE_KERNEL(encode_rows_backward, void(const QuantizeRowsBackward&, int64_t begin, int64_t end))

}  // namespace vidmem
