// CPU kernels of linear attention on raw pointers, for one batch element and head; strides count elements.
//
// Sums are float. A state is S (size, padded(value_size)), then z (padded(size)), with zeros
// in the padding.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"

namespace vidmem {

enum class FeatureMap { relu, elu1, identity };

constexpr int64_t kChunkTokens = 64;  // widened at a time

struct Tokens {
  const void* data;
  int64_t token_stride, channel_stride;
};

struct LinearAttention {
  DType dtype;
  FeatureMap map;
  bool normalize;
  float scale;  // factor of the queries' features
  int64_t size, value_size;
  int64_t block;  // tokens that see each other
  int64_t group;  // tokens of whole blocks between two updates of the state: a block, or a chunk of small blocks
  Tokens q, k, v;
  void* out;  // channels are contiguous
  int64_t out_stride;
  float* scratch;  // scratch_size(size, value_size)
};

namespace {

inline int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }

[[maybe_unused]] inline int64_t state_size(int64_t size, int64_t value_size) {
  return size * padded(value_size) + padded(size);
}

[[maybe_unused]] inline int64_t scratch_size(int64_t size, int64_t value_size) {
  const int64_t tiles = kChunkTokens * (3 * padded(size) + 2 * padded(value_size) + 8 + 1);
  return tiles + padded(state_size(size, value_size));
}

[[maybe_unused]] inline int64_t backward_scratch_size(int64_t size, int64_t value_size) {
  const int64_t row = padded(size), value_row = padded(value_size);
  return scratch_size(size, value_size) + kChunkTokens * (row + 2 * value_row + 1) + 2 * row * value_row + row;
}

}  // namespace

struct LinearAttentionBackward {
  LinearAttention forward;  // without `out`; scratch of backward_scratch_size
  Tokens grad_out;
  void *grad_q, *grad_k, *grad_v;  // channels are contiguous
  int64_t grad_q_stride, grad_k_stride, grad_v_stride;
  float *total, *grad_total;  // denominator of every token and its gradient
};

// state += the sum over the tokens [begin, end), whole groups.
VIDMEM_DECLARE_KERNEL(sum_state, void(const LinearAttention&, int64_t begin, int64_t end, float* state))

// Outputs of the tokens [begin, end), which all see `state`.
VIDMEM_DECLARE_KERNEL(read_state, void(const LinearAttention&, int64_t begin, int64_t end, const float* state))

// Outputs of whole groups that see `before` and, by blocks, one another; `state` as in sum_state.
VIDMEM_DECLARE_KERNEL(scan_tokens,
                      void(const LinearAttention&, int64_t begin, int64_t end, const float* before, float* state))

// Gradients of the queries [begin, end), `total` and `grad_total`; grad_state = what they add to the gradient of the
// state. They see `state`, or with `scan` that and, by groups, one another.
VIDMEM_DECLARE_KERNEL(grad_queries, void(const LinearAttentionBackward&, bool scan, int64_t begin, int64_t end,
                                         const float* state, float* grad_state))

// Gradients of the keys and values [begin, end) from `grad_state`, the gradient of the state after them.
VIDMEM_DECLARE_KERNEL(grad_keys, void(const LinearAttentionBackward&, bool scan, int64_t begin, int64_t end,
                                      const float* grad_state))

}  // namespace vidmem
