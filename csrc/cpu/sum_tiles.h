// Sums of rows kept in registers. For *_kernels.cpp: internal linkage, each instruction set keeps its own copy.
#pragma once

#include "common/numeric.h"

namespace vidmem {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Sum> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(kVectorBytes))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(kVectorBytes))); };
using Floats = VectorOf<float>::type;
using Doubles = VectorOf<double>::type;

inline void load(const float* in, Floats& out) { memcpy(&out, in, sizeof out); }
inline void load(const double* in, Doubles& out) { memcpy(&out, in, sizeof out); }
inline void load(const bf16* in, Floats& out) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  Halves halves;
  memcpy(&halves, in, sizeof halves);
  out = reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}
#if defined(__AVX512F__)
inline void load(const fp16* in, Floats& out) {
  out = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)in));  // no mask: GCC 12 warns
}
#elif defined(__F16C__)
inline void load(const fp16* in, Floats& out) { out = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)in)); }
#else
inline void load(const fp16* in, Floats& out) {
  for (int c = 0; c < kVectorBytes / 4; ++c) out[c] = widen(in[c]);
}
#endif

// Adds `registers` vectors of the rows order[0], ..., order[count - 1] to as many sums.
template <int registers, class T, class Sum, class Before>
inline void add_tile(const T* src, int64_t row_stride, const int64_t* order, int64_t count, Sum* sums,
                     const Before& before_row) {
  using Vector = typename VectorOf<Sum>::type;
  constexpr int kLanes = kVectorBytes / sizeof(Sum);
  Vector tile[registers];
  for (int i = 0; i < registers; ++i) load(sums + i * kLanes, tile[i]);
  for (int64_t k = 0; k < count; ++k) {
    before_row(k);
    const T* in = src + order[k] * row_stride;
    for (int i = 0; i < registers; ++i) {
      Vector values;
      load(in + i * kLanes, values);
      tile[i] += values;
    }
  }
  for (int i = 0; i < registers; ++i) memcpy(sums + i * kLanes, &tile[i], sizeof tile[i]);
}

// The same for the sums of a row of `width`, as far as they fill vectors: returns how many sums that are. Calls
// before_row(k) before the first read of row k.
template <class T, class Sum, class Before>
inline int64_t add_tiles(const T* src, int64_t row_stride, const int64_t* order, int64_t count, Sum* sums,
                         int64_t width, const Before& before_row) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(Sum);
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
