// Tensors as kernels see them, without torch's headers: a data pointer and the stride of each axis, in elements.
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
