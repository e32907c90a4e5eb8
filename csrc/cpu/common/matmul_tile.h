// Products of small matrices in the caches, row-major and padded to whole vectors of 64 bytes.
//
// The order of the sum over the depth does not depend on the rows and columns that an element is computed with. For
// *_kernels.cpp: internal linkage, each instruction set keeps its own copy.
#pragma once

#include "cpu/common/lanes.h"

namespace vidmem {
namespace {

#define VIDMEM_INLINE inline __attribute__((always_inline))

// A register tile has kTileRows rows of kTileVectors vectors; a row of vectors and a broadcast need further registers.
constexpr int64_t kTileRows = 6;
constexpr int64_t kDepth = 128;  // products that one accumulator sums
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

[[maybe_unused]] inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

VIDMEM_INLINE void clear(float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
}

// Sets out[first .. last) to zero; the last vector may be written whole.
VIDMEM_INLINE void clear_from(float* out, int64_t first, int64_t last) {
  Ints lane;
#pragma GCC unroll 16
  for (int l = 0; l < kFloats; ++l) lane[l] = l;
  for (int64_t c = first / kFloats * kFloats; c < last; c += kFloats) {
    store(lane < static_cast<int32_t>(first - c) ? load(out + c) : Floats{}, out + c);
  }
}

// The left factor: element (i, k) at data[i * row + k * step].
struct Left {
  const float* data;
  int64_t row, step;
  Left from(int64_t first) const { return {data + first * row, row, step}; }
};

template <int R, int N, bool Add>
VIDMEM_INLINE void multiply_tile(const Left& a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row) {
  Floats sum[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = Floats{};
  }
  const float* left = a.data;
  for (int64_t k = 0; k < depth; ++k, left += a.step, b += b_row) {
    Floats right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load(b + n * kFloats);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Floats x = left[r * a.row] - Floats{};  // a broadcast
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] += x * right[n];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = c + r * c_row + n * kFloats;
      if constexpr (Add) sum[r][n] += load(at);
      store(sum[r][n], at);
    }
  }
}

template <int N, bool Add>
void multiply_rows(Left a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, int64_t rows) {
  for (; rows >= kTileRows; rows -= kTileRows, a = a.from(kTileRows), c += kTileRows * c_row) {
    multiply_tile<kTileRows, N, Add>(a, b, b_row, depth, c, c_row);
  }
  switch (rows) {
    case 5: return multiply_tile<5, N, Add>(a, b, b_row, depth, c, c_row);
    case 4: return multiply_tile<4, N, Add>(a, b, b_row, depth, c, c_row);
    case 3: return multiply_tile<3, N, Add>(a, b, b_row, depth, c, c_row);
    case 2: return multiply_tile<2, N, Add>(a, b, b_row, depth, c, c_row);
    case 1: return multiply_tile<1, N, Add>(a, b, b_row, depth, c, c_row);
    default: return;
  }
}

// c (rows, columns) += a (rows, depth) @ b (depth, columns); without Add, = for the first part of the depth.
template <bool Add>
void multiply_part(const Left& a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, int64_t rows,
                   int64_t columns) {
  for (int64_t n = 0; n < columns; n += kTileVectors * kFloats) {
    const int64_t vectors = (columns - n + kFloats - 1) / kFloats;
    if (vectors == 1) {
      multiply_rows<1, Add>(a, b + n, b_row, depth, c + n, c_row, rows);
    } else if (vectors == 2 || kTileVectors == 2) {
      multiply_rows<2, Add>(a, b + n, b_row, depth, c + n, c_row, rows);
    } else if (vectors == 3) {
      multiply_rows<3, Add>(a, b + n, b_row, depth, c + n, c_row, rows);
    } else {
      multiply_rows<kTileVectors, Add>(a, b + n, b_row, depth, c + n, c_row, rows);
    }
  }
}

// c (rows, columns) = or += a (rows, depth) @ b (depth, columns); columns are rounded up to whole vectors. Every kDepth
// products are summed separately, because one long sum has larger rounding errors than the reference's products.
template <bool Add>
void multiply(Left a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, int64_t rows,
              int64_t columns) {
  multiply_part<Add>(a, b, b_row, smaller(kDepth, depth), c, c_row, rows, columns);
  for (int64_t k = kDepth; k < depth; k += kDepth) {
    multiply_part<true>(Left{a.data + k * a.step, a.row, a.step}, b + k * b_row, b_row, smaller(kDepth, depth - k), c,
                        c_row, rows, columns);
  }
}

// Sum of x[i] * y[i]; the count is rounded up to whole vectors.
VIDMEM_INLINE float dot(const float* x, const float* y, int64_t count) {
  Floats sum{};
  for (int64_t i = 0; i < count; i += kFloats) sum += load(x + i) * load(y + i);
  return sum_lanes(sum);
}

[[maybe_unused]] inline double wide_dot(const float* x, const float* y, int64_t count) {
  Doubles sums{};
  for (int64_t i = 0; i < count; i += kFloats) {
    const Floats a = load(x + i), b = load(y + i);
    sums += lower(a) * lower(b) + upper(a) * upper(b);
  }
  return sum_lanes(sums);
}

// out[c] += the sum of a column of x over its rows.
VIDMEM_INLINE void add_column_sums(const float* x, int64_t row, int64_t rows, int64_t columns, float* out) {
  int64_t c = 0;
  for (; c + 4 * kFloats <= columns; c += 4 * kFloats) {  // four sums hide the latency of additions
    Floats sums[4] = {};
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) sums[n] += load(x + i * row + c + n * kFloats);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) store(load(out + c + n * kFloats) + sums[n], out + c + n * kFloats);
  }
  for (; c < columns; c += kFloats) {
    Floats sum{};
    for (int64_t i = 0; i < rows; ++i) sum += load(x + i * row + c);
    store(load(out + c) + sum, out + c);
  }
}

// out = x + y over whole vectors.
VIDMEM_INLINE void add_rows(const float* x, const float* y, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kFloats) store(load(x + i) + load(y + i), out + i);
}

VIDMEM_INLINE bool all_finite(const float* x, int64_t count) {
  Floats sums[4] = {};
  for (int64_t i = 0; i < count; i += 4 * kFloats) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      if (i + n * kFloats < count) sums[n] += load(x + i + n * kFloats) - load(x + i + n * kFloats);
    }
  }
  return sum_lanes(sums[0] + sums[1] + sums[2] + sums[3]) == 0;
}

// Swaps the second halves of groups of 2 * Step lanes of `a` with the first halves of those of `b`.
template <int Step>
VIDMEM_INLINE void swap_halves(Floats& a, Floats& b) {
  Ints first{}, second{};
#pragma GCC unroll 16
  for (int l = 0; l < kFloats; ++l) {
    first[l] = l & Step ? kFloats + l - Step : l;
    second[l] = l & Step ? kFloats + l : l + Step;
  }
  const Floats x = a, y = b;
  a = __builtin_shuffle(x, y, first);
  b = __builtin_shuffle(x, y, second);
}

template <int Step>
VIDMEM_INLINE void transpose_steps(Floats (&rows)[kFloats]) {
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; ++i) {
    if (!(i & Step)) swap_halves<Step>(rows[i], rows[i + Step]);
  }
  if constexpr (Step > 1) transpose_steps<Step / 2>(rows);
}

// out (columns, rows) = x (rows, columns) transposed.
[[maybe_unused]] inline void transpose(const float* x, int64_t x_row, int64_t rows, int64_t columns, float* out,
                                       int64_t out_row) {
  int64_t i = 0;
  for (; i + kFloats <= rows; i += kFloats) {
    int64_t c = 0;
    for (; c + kFloats <= columns; c += kFloats) {
      Floats square[kFloats];
#pragma GCC unroll 16
      for (int r = 0; r < kFloats; ++r) square[r] = load(x + (i + r) * x_row + c);
      transpose_steps<kFloats / 2>(square);
#pragma GCC unroll 16
      for (int r = 0; r < kFloats; ++r) store(square[r], out + (c + r) * out_row + i);
    }
    for (; c < columns; ++c) {
      for (int r = 0; r < kFloats; ++r) out[c * out_row + i + r] = x[(i + r) * x_row + c];
    }
  }
  for (; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) out[c * out_row + i] = x[i * x_row + c];
  }
}

}  // namespace
}  // namespace vidmem
