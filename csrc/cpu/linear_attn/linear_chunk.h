// Code shared by the passes of linear attention: tiles of a chunk of tokens, its products with a state and with itself.
//
// For *_kernels.cpp: internal linkage, each instruction set keeps its own copy.
#pragma once

#include "cpu/common/matmul_tile.h"
#include "cpu/common/prefetch.h"
#include "cpu/linear_attn/feature_map.h"
#include "cpu/linear_attn/linear_attention_kernels.h"

namespace vidmem {
namespace {

constexpr float kEps = 1e-10f;  // as in the reference

// Calls f(TypeTag<storage type>{}).
template <class F>
inline void dispatch_tokens(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bfloat16: return f(TypeTag<bf16>{});
    case DType::float16: return f(TypeTag<fp16>{});
    default: return f(TypeTag<float>{});
  }
}

template <class T>
struct Chunk {
  Chunk(const LinearAttention& args, float* scratch) : a(args) {
    queries = scratch;
    keys = queries + kChunkTokens * row;
    transposed = keys + kChunkTokens * row;
    values = transposed + kChunkTokens * row;
    sums = values + kChunkTokens * value_row;
    scores = sums + kChunkTokens * value_row;
    totals = scores + 8 * kChunkTokens;
    seen = totals + kChunkTokens;
    for (int64_t i = 0; i < kChunkTokens && is_masked(); ++i) ends[i] = (i / a.block + 1) * a.block;
  }

  // Tokens of a group see the state before it and, up to the end of their block, one another; else the state after.
  bool is_masked() const { return a.group > a.block; }

  float* z_of(float* state) const { return state + a.size * value_row; }
  const float* z_of(const float* state) const { return state + a.size * value_row; }

  // The first token of a masked group that its token `i` does not see.
  int64_t end_of_block(int64_t i, int64_t count) const { return smaller(count, ends[i]); }

  // Rows of the group that are multiplied together: one at a time if a product of 0 and a row of `tile` that is not
  // visible could be NaN.
  int64_t rows_at_once(const float* tile, int64_t size) const { return all_finite(tile, size) ? kTileRows : 1; }

  void see(const float* before, const float* state) { add_rows(before, state, seen, state_size(a.size, a.value_size)); }

  // multiply(), and prefetches the tokens [first, first + kChunkTokens) of up to two tensors: hardware prefetchers do
  // not cross the gaps between heads.
  template <bool Add>
  void multiply_ahead(Left left, const float* right, int64_t depth, float* out, int64_t rows, const Tokens& tokens,
                      const Tokens* more, int64_t first) {
    if (rows == 0) return;  // a head without channels has no state
    constexpr int64_t block = 2 * kTileRows;
    const int64_t blocks = (rows + block - 1) / block, share = (kChunkTokens + blocks - 1) / blocks;
    for (int64_t i = 0; i < rows; i += block, first += share) {
      for (int64_t t = first; t < first + share; ++t) {
        ask(tokens, t, a.size);
        if (more) ask(*more, t, a.value_size);
      }
      multiply<Add>(left.from(i), right, value_row, depth, out + i * value_row, value_row, smaller(block, rows - i),
                    a.value_size);
    }
  }

  static void ask(const Tokens& tokens, int64_t t, int64_t channels) {
    if (tokens.channel_stride != 1) return;
    prefetch(static_cast<const T*>(tokens.data) + t * tokens.token_stride, channels * int64_t(sizeof(T)));
  }

  void read_keys(int64_t first, int64_t count) {
    read_features<T>(a.k, a.map, first, count, a.size, keys, row);
    read_tokens<T>(a.v, first, count, a.value_size, values, value_row);
  }

  // Prefetches keys and values of `next`.
  void add_keys(int64_t next, int64_t count, float* state) {
    multiply_ahead<true>(Left{keys, 1, row}, values, count, state, a.size, a.k, &a.v, next);
    add_column_sums(keys, row, count, row, z_of(state));
  }

  void add_group(int64_t begin, int64_t end, float* state) {
    for (int64_t first = begin; first < end; first += kChunkTokens) {
      const int64_t count = smaller(kChunkTokens, end - first);
      read_keys(first, count);
      add_keys(first + count, count, state);
    }
  }

  // Numerators of a chunk from the state alone.
  void query_state(int64_t first, int64_t count, const float* state) {
    read_features<T>(a.q, a.map, first, count, a.size, queries, row);
    multiply_ahead<false>(Left{queries, row, 1}, state, a.size, sums, count, a.q, nullptr, first + count);
  }

  // Denominators of a chunk whose tokens all see the same keys, with the sum `z`.
  void query_total(int64_t count, const float* z) {
    for (int64_t t = 0; t < count && a.normalize; ++t) totals[t] = dot(queries + t * row, z, row);
  }

  // Denominators of a masked group, whose keys have been read; `z` becomes the sum that its last token sees.
  void query_totals(int64_t count, float* z) {
    int64_t end = 0;
    for (int64_t t = 0; t < count && a.normalize; ++t) {
      for (; end < end_of_block(t, count); ++end) add_rows(z, keys + end * row, z, row);
      totals[t] = dot(queries + t * row, z, row);
    }
  }

  // Adds to the numerators of a masked group what its tokens see of each other.
  void query_group(int64_t count) {
    transpose(keys, row, count, a.size, transposed, kChunkTokens);
    const int64_t step = rows_at_once(values, count * value_row);
    for (int64_t i = 0; i < count; i += step) {
      const int64_t rows = smaller(step, count - i), end = end_of_block(i + rows - 1, count);
      multiply<false>(Left{queries + i * row, row, 1}, transposed, kChunkTokens, a.size, scores, kChunkTokens, rows,
                      end);
      for (int64_t r = 0; r < rows; ++r) clear_from(scores + r * kChunkTokens, end_of_block(i + r, count), end);
      multiply<true>(Left{scores, kChunkTokens, 1}, values, value_row, end, sums + i * value_row, value_row, rows,
                     a.value_size);
    }
  }

  const LinearAttention& a;
  const int64_t row = padded(a.size), value_row = padded(a.value_size);
  float *queries, *keys, *transposed, *values, *sums, *scores, *totals, *seen;
  int64_t ends[kChunkTokens];
};

}  // namespace
}  // namespace vidmem
