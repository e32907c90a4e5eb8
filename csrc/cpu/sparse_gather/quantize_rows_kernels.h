// CPU kernels of quantisation by rows on raw pointers; strides count elements.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"

namespace vidmem {

struct QuantizeRows {
  const void* x;  // (B, M, C)
  DType dtype;
  int64_t batch_stride, row_stride, channel_stride;
  void* rows;  // (B, M, C) contiguous
  DType rows_dtype;
  void* scale;  // (B, M) contiguous; float, or double for double
  int64_t rows_per_batch, channels;
};

struct QuantizeRowsBackward {
  const void* grad_scale;  // (B, M) of the type of the scale
  int64_t grad_batch_stride, grad_row_stride;
  const void* x;
  DType dtype;
  int64_t batch_stride, row_stride, channel_stride;
  DType rows_dtype;
  void* grad;  // (B, M, C) contiguous, of the type of x
  int64_t rows_per_batch, channels;
};

// Rows [begin, end) of the flattened (B, M).
VIDMEM_DECLARE_KERNEL(encode_rows, void(const QuantizeRows&, int64_t begin, int64_t end))
VIDMEM_DECLARE_KERNEL(encode_rows_backward, void(const QuantizeRowsBackward&, int64_t begin, int64_t end))

}  // namespace vidmem
