// Sums of rows kept in registers. For *_kernels.cpp: internal linkage, each instruction set keeps its own copy.
#pragma once

#include "cpu/common/lanes.h"

namespace vidmem {
namespace {

// Adds `registers` vectors of the rows order[0], ..., order[count - 1] to the same number of sums.
template <int registers, class T, class Sum, class Before>
inline void add_tile(const T* src, int64_t row_stride, const int64_t* order, int64_t count, Sum* sums,
                     const Before& before_row) {
  using Vector = typename Lanes<Sum>::type;
  constexpr int kLanes = Lanes<Sum>::count;
  Vector tile[registers];
  for (int i = 0; i < registers; ++i) tile[i] = load(sums + i * kLanes);
  for (int64_t k = 0; k < count; ++k) {
    before_row(k);
    const T* in = src + order[k] * row_stride;
    for (int i = 0; i < registers; ++i) tile[i] += load(in + i * kLanes);
  }
  for (int i = 0; i < registers; ++i) store(tile[i], sums + i * kLanes);
}

// The same for the sums of a row of `width`, as far as they fill whole vectors; returns the number of these sums. Calls
// before_row(k) before the first read of row k.
template <class T, class Sum, class Before>
inline int64_t add_tiles(const T* src, int64_t row_stride, const int64_t* order, int64_t count, Sum* sums,
                         int64_t width, const Before& before_row) {
  constexpr int64_t kLanes = Lanes<Sum>::count;
  const auto once = [&](int64_t first) {
    return [&before_row, first](int64_t k) {
      if (first == 0) before_row(k);
    };
  };
  int64_t first = 0;
  for (; first + 8 * kLanes <= width; first += 8 * kLanes) {
    add_tile<8>(src + first, row_stride, order, count, sums + first, once(first));
  }
  for (; first + kLanes <= width; first += kLanes) {
    add_tile<1>(src + first, row_stride, order, count, sums + first, once(first));
  }
  return first;
}

}  // namespace
}  // namespace vidmem
