// How kernels see tensors, without a header of torch: where one begins, and how many elements lie between two indices
// of each axis.
#pragma once

#include <stdint.h>

namespace vidmem {

struct Matrix {  // (B, N)
  const void* data;
  int64_t batch_stride, stride;
};

struct Rows {  // (B, N, C)
  const void* data;
  int64_t batch_stride, row_stride, channel_stride;
};

struct HeadRows {  // (B, L, H, D)
  const void* data;
  int64_t batch_stride, row_stride, head_stride, channel_stride;
};

}  // namespace vidmem
