// Dot products of many rows with many columns, processed tile by tile and never stored as a matrix.
//
// A row occupies one lane of a vector and a column is broadcast, so that a running best per row needs no shuffles and a
// row's state stays in registers. Every product is summed over the channels in order with one accumulator, whatever the
// position of its row and column: equal vectors have equal scores, bit by bit.
//
// For *_kernels.cpp only: everything is internal to one instruction set.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "cpu/common/score_layout.h"

namespace vidmem {
namespace {

// A tile is kVectors vectors of rows by kPanels panels of columns; its accumulators leave room for the operands
// among the 32 (AVX-512) or 16 registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectors = 2, kPanels = 3;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectors = 3, kPanels = 1;
#else
constexpr int kVectorBytes = 16, kVectors = 2, kPanels = 1;
#endif
constexpr int kColumns = kPanelColumns;

#define VIDMEM_INLINE inline __attribute__((always_inline))

template <class T> struct Simd;
template <> struct Simd<float> {
  using Int = int32_t;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
};
template <> struct Simd<double> {
  using Int = int64_t;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
};

template <class T> constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
template <class T> constexpr int kLanes = kVectors * kWidth<T>;  // rows of a pack

template <class V, class P>
VIDMEM_INLINE V load(const P* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class P>
VIDMEM_INLINE void store(P* to, const V& v) {
  memcpy(to, &v, sizeof v);
}

// x * y + sum with one rounding if the instruction set supports it; otherwise compilers are told not to fuse.
template <class V>
VIDMEM_INLINE V multiply_add(const V& x, const V& y, const V& sum) {
#if defined(__AVX512F__)
  constexpr bool is_float = sizeof(x[0]) == 4;
  if constexpr (is_float) return (V)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
  else return (V)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)sum);
#elif defined(__FMA__)
  constexpr bool is_float = sizeof(x[0]) == 4;
  if constexpr (is_float) return (V)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
  else return (V)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
#else
  return x * y + sum;
#endif
}

template <class In, class T>
inline void widen_row(const In* in, int64_t stride, int64_t channels, T* out) {
  if (stride == 1) {
    for (int64_t c = 0; c < channels; ++c) out[c] = widen(in[c]);
  } else {
    for (int64_t c = 0; c < channels; ++c) out[c] = widen(in[c * stride]);
  }
}

#if defined(__F16C__)
inline void widen_row(const fp16* in, int64_t stride, int64_t channels, float* out) {
  int64_t c = 0;
  if (stride == 1) {
    for (; c + 8 <= channels; c += 8) {
      _mm256_storeu_ps(out + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + c))));
    }
  }
  for (; c < channels; ++c) out[c] = widen(in[c * stride]);
}
#endif

// `data` + `offset` elements, widened.
inline void read_row(const void* data, DType, int64_t offset, int64_t stride, int64_t channels, double* out) {
  widen_row(static_cast<const double*>(data) + offset, stride, channels, out);
}
inline void read_row(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t channels, float* out) {
  switch (dtype) {
    case DType::bfloat16: return widen_row(static_cast<const bf16*>(data) + offset, stride, channels, out);
    case DType::float16: return widen_row(static_cast<const fp16*>(data) + offset, stride, channels, out);
    default: return widen_row(static_cast<const float*>(data) + offset, stride, channels, out);
  }
}

// Writes four rows of `pitch` elements to four neighbouring columns of out[channel][stride].
template <class T>
inline void interleave(const T* rows, int64_t pitch, int64_t channels, T* __restrict out, int64_t stride) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int j = 0; j < kColumns; ++j) out[c * stride + j] = rows[j * pitch + c];
  }
}

template <class T, int P>
using Tile = typename Simd<T>::V[P * kColumns][kVectors];

// One tile: a pack of rows, pack[channel][lane], with P neighbouring panels. `epilogue.take<P>(column, tile)`
// receives the scores; `column` is the number of the first one.
template <class T, int P, class Epilogue>
VIDMEM_INLINE void score_tile(const T* pack, const T* panels, int64_t channels, int64_t column, Epilogue& epilogue) {
  using V = typename Simd<T>::V;
  Tile<T, P> sum;
#pragma GCC unroll 12
  for (int j = 0; j < P * kColumns; ++j) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[j][v] = V{};
  }
  const int64_t panel_size = channels * kColumns;
  for (int64_t c = 0; c < channels; ++c) {
    V row[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) row[v] = load<V>(pack + c * kLanes<T> + v * kWidth<T>);
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        const V x = panels[p * panel_size + c * kColumns + j] - V{};  // a broadcast
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          sum[p * kColumns + j][v] = multiply_add(x, row[v], sum[p * kColumns + j][v]);
        }
      }
    }
  }
  epilogue.template take<P>(column, sum);
}

template <class T, class Epilogue>
VIDMEM_INLINE void score_panels(const T* pack, const T* panels, int64_t count, int64_t channels, int64_t column,
                                Epilogue& epilogue) {
  const int64_t panel_size = channels * kColumns;
  int64_t p = 0;
  for (; p + kPanels <= count; p += kPanels) {
    score_tile<T, kPanels>(pack, panels + p * panel_size, channels, column + p * kColumns, epilogue);
  }
  if constexpr (kPanels > 2) {
    if (count - p == 2) {
      score_tile<T, 2>(pack, panels + p * panel_size, channels, column + p * kColumns, epilogue);
      p += 2;
    }
  }
  if constexpr (kPanels > 1) {
    if (count - p == 1) score_tile<T, 1>(pack, panels + p * panel_size, channels, column + p * kColumns, epilogue);
  }
}

// Number of panels that are scored with every pack of a group before the next ones; they stay in the L2 cache.
constexpr int64_t kPanelBlockBytes = 256 << 10;

// score(first row, panels, number of panels, number of the first column) for every pack of `rows` with every block of
// panels; for each pack the columns ascend.
template <class T, class Score>
VIDMEM_INLINE void score_blocks(const T* panels, int64_t count, int64_t channels, int64_t rows, const Score& score) {
  const int64_t panel_size = channels * kColumns;
  const int64_t bytes = panel_size * sizeof(T);
  int64_t block = kPanelBlockBytes / (bytes > 0 ? bytes : 1) / kPanels * kPanels;
  if (block < kPanels) block = kPanels;
  for (int64_t p = 0; p < count; p += block) {
    const int64_t some = count - p < block ? count - p : block;
    for (int64_t s = 0; s < rows; s += kLanes<T>) score(s, panels + p * panel_size, some, p * kColumns);
  }
}

// Best column of every row of a pack so far.
template <class T>
struct Best {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Int = typename Simd<T>::Int;
  V best[kVectors];
  I index[kVectors];

  VIDMEM_INLINE void read(const T* scores, const Int* numbers) {
    for (int v = 0; v < kVectors; ++v) {
      best[v] = load<V>(scores + v * kWidth<T>);
      index[v] = load<I>(numbers + v * kWidth<T>);
    }
  }

  VIDMEM_INLINE void write(T* scores, Int* numbers) const {
    for (int v = 0; v < kVectors; ++v) {
      store(scores + v * kWidth<T>, best[v]);
      store(numbers + v * kWidth<T>, index[v]);
    }
  }

  template <int P>
  VIDMEM_INLINE void take(int64_t column, const Tile<T, P>& score) {
    I number = I{} + static_cast<Int>(column);
#pragma GCC unroll 12
    for (int j = 0; j < P * kColumns; ++j) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        const I greater = score[j][v] > best[v];
        best[v] = greater ? score[j][v] : best[v];
        index[v] = greater ? number : index[v];
      }
      number += 1;
    }
  }
};

}  // namespace
}  // namespace vidmem
