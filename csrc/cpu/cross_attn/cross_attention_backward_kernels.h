// CPU kernels of the gradient of cross-attention; conventions as in cross_attention_kernels.h.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/isa.h"
#include "cpu/cross_attn/attention_layout.h"

namespace vidmem {

// Computes the terms that all keys of a query share: its lse, or 0 if it sees no key, and grad . out - grad_lse.
struct QueryTerms {
  AttentionRows out, grad;
  const void *lse, *grad_lse;  // in the type of sums; grad_lse may be null
  int64_t lse_stride, grad_lse_stride;
  void *base, *shared;
  void* scratch;  // two rows
};

struct AttendKeys {
  AttentionRows q, k, v, grad;
  const void* bias;        // of every key, in the type of sums; null: none
  AttentionWindow window;  // none for keys that are sinks
  double scale;
  const void *base, *shared;  // of every query
  const int32_t* queries;     // the queries that see some key of the group, ascending; the window is applied again
  int64_t num_queries;
  int64_t first, count;           // keys of the group
  void *grad_k, *grad_v;          // of this batch element and head, in the dtype of q
  int64_t grad_k_stride, grad_v_stride;
  void* grad_bias;  // of every key, in the type of sums
  void* grad_q;     // (Lq, D) sums to add to, without the scale
  void* scratch;
};

struct SumQueries {
  const void* parts;  // `count` times (Lq, D), part_stride apart
  int64_t count, part_stride, channels;
  double scale;
  DType dtype;
  void* grad_q;
  int64_t grad_q_stride;
  void* scratch;  // a row
};

// Bytes of scratch of a group of `rows` keys, a multiple of kAttentionLanes, if sums have `size` bytes.
constexpr int64_t attend_keys_scratch(int64_t rows, int64_t channels, int64_t value_channels, int64_t size) {
  const int64_t key_row = channels + kChannelPad, value_row = value_channels + kChannelPad;
  return (rows * (3 * key_row + 2 * value_row + 2) +
          kAttentionTile * (3 * key_row + 2 * value_row + 2 * kAttentionLanes) + key_row + value_row) * size +
         rows * 16 + 8192;
}

VIDMEM_DECLARE_KERNEL(query_terms, void(const QueryTerms&, int64_t begin, int64_t end))
VIDMEM_DECLARE_KERNEL(attend_keys, void(const AttendKeys&))
VIDMEM_DECLARE_KERNEL(sum_queries, void(const SumQueries&, int64_t begin, int64_t end))

}  // namespace vidmem
