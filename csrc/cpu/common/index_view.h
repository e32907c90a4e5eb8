// An int32 or int64 (B, K) index, read in place.
#pragma once

#include <stdint.h>

namespace vidmem {

struct IndexView {
  const void* data;
  bool wide;  // int64
  int64_t batch_stride, stride;
};

namespace {  // internal linkage: each instruction set keeps its own copy

[[maybe_unused]] inline int64_t row_at(const IndexView& index, int64_t batch, int64_t k) {
  const int64_t offset = batch * index.batch_stride + k * index.stride;
  return index.wide ? static_cast<const int64_t*>(index.data)[offset] : static_cast<const int32_t*>(index.data)[offset];
}

}  // namespace
}  // namespace vidmem
