// The groups of a plan, as read by the kernels of merging. For *_kernels.cpp: internal linkage, each instruction set
// keeps its own copy.
#pragma once

#include "cpu/common/convert_rows.h"
#include "cpu/common/prefetch.h"
#include "cpu/token_merge/token_merge_kernels.h"

namespace vidmem {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Index>
struct Group {
  const Index* order;
  int64_t stride, count;
  int64_t after;  // tokens that follow the group in `order`

  int64_t operator[](int64_t k) const { return order[k * stride]; }
};

// The tokens of a row, after a check that they agree with the rest of the plan. If all rows pass, `order` is a
// permutation: tokens of a row are ascending and assigned to it, so none occurs twice, and their number is right.
template <class Index>
inline bool find_group(const Groups& g, int64_t batch, int64_t row, Group<Index>& group) {
  const Index* offsets = static_cast<const Index*>(g.offsets.data) + batch * g.offsets.batch_stride;
  const int64_t first = offsets[row * g.offsets.stride], last = offsets[(row + 1) * g.offsets.stride];
  if (first < 0 || last < first || last > g.tokens) return false;
  if ((row == 0 && first != 0) || (row == g.rows - 1 && last != g.tokens)) return false;
  const Index* order = static_cast<const Index*>(g.order.data) + batch * g.order.batch_stride;
  group = {order + first * g.order.stride, g.order.stride, last - first, g.tokens - last};
  const Index* assignment = static_cast<const Index*>(g.assignment.data) + batch * g.assignment.batch_stride;
  int64_t before = -1;
  for (int64_t k = 0; k < group.count; ++k) {
    const int64_t token = group[k];
    if (token <= before || token >= g.tokens || assignment[token * g.assignment.stride] != row) return false;
    before = token;
  }
  return true;
}

// Calls work(batch, row, group) for the rows [begin, end) of the flattened (B, M); returns false at an invalid group.
template <class Index, class Work>
inline bool for_groups(const Groups& g, int64_t begin, int64_t end, const Work& work) {
  int64_t batch = g.rows ? begin / g.rows : 0, row = begin - batch * g.rows;
  for (int64_t i = begin; i < end; ++i) {
    Group<Index> group;
    if (!find_group(g, batch, row, group)) return false;
    work(batch, row, group);
    if (++row == g.rows) {
      row = 0;
      ++batch;
    }
  }
  return true;
}

// Sizes of tokens and of groups; 1 per token if no sizes are given.
template <class S>
struct Sizes {
  const S* data;
  int64_t stride;

  Sizes(const Matrix& w, int64_t batch)
      : data(w.data ? static_cast<const S*>(w.data) + batch * w.batch_stride : nullptr), stride(w.stride) {}

  S operator[](int64_t token) const { return data ? data[token * stride] : S(1); }

  template <class Index>
  S total(const Group<Index>& group) const {
    if (!data) return static_cast<S>(group.count);
    S sum = 0;
    for (int64_t k = 0; k < group.count; ++k) sum += data[group[k] * stride];
    return sum;
  }

  S share(int64_t token, S total) const { return total == 0 ? S(0) : (*this)[token] / total; }
};

// Prefetches this many bytes of a later row, because the hardware prefetcher does not predict jumps between rows.
constexpr int64_t kAheadBytes = 2048;

template <class T>
inline void prefetch_row(const T* in, int64_t channels) {
  prefetch(in, smaller(kAheadBytes, channels * sizeof(T)));
}

}  // namespace
}  // namespace vidmem
