// CPU kernels of merge_attention_states on raw pointers; strides count elements. Sums of double are double, else float.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/layout.h"

namespace vidmem {

struct LogSums {  // (B, H, L) in the type of sums
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// Items are the rows of (B, L, H), in this order; results are contiguous.
struct MergeStates {
  const HeadRows* outs;
  const LogSums* lses;
  int64_t parts;
  DType dtype;
  int64_t length, heads, channels;
  void *out, *lse;
  bool streams;  // write `out` without reading it into the caches
};

struct MergeStatesBackward {
  HeadRows grad_out;
  LogSums grad_lse;  // null: zeros
  const HeadRows* outs;
  const LogSums* lses;
  int64_t parts;
  LogSums lse;
  DType dtype;
  int64_t rows, length, heads, channels;  // rows: B * L * H
  void *grad_outs, *grad_lses;            // part after part
};

// Bytes of scratch for each call of a kernel.
constexpr int64_t merge_states_scratch(int64_t parts, int64_t channels, int64_t size) {
  return (2 * parts + 3 * channels) * size + 512;
}

VIDMEM_DECLARE_KERNEL(merge_states, void(const MergeStates&, int64_t begin, int64_t end, void* scratch))
VIDMEM_DECLARE_KERNEL(merge_states_backward,
                      void(const MergeStatesBackward&, int64_t begin, int64_t end, void* scratch))

}  // namespace vidmem
