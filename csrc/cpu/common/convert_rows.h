// Loops over contiguous elements, with the conversions of float16 that compilers do not vectorise. For *_kernels.cpp:
// internal linkage, each instruction set keeps its own copy.
#pragma once

#include "common/numeric.h"

namespace vidmem {
namespace {

template <class T, class Float>
[[maybe_unused]] inline void widen_row(const T* in, Float* out, int64_t count) {
  for (int64_t c = 0; c < count; ++c) out[c] = widen(in[c]);
}

template <class T, class Float>
[[maybe_unused]] inline void narrow_row(const Float* in, T* out, int64_t count) {
  for (int64_t c = 0; c < count; ++c) narrow(in[c], out[c]);
}

#if defined(__F16C__)
[[maybe_unused]] inline void widen_row(const fp16* in, float* out, int64_t count) {
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) {
    _mm256_storeu_ps(out + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + c))));
  }
  for (; c < count; ++c) out[c] = widen(in[c]);
}

[[maybe_unused]] inline void narrow_row(const float* in, fp16* out, int64_t count) {
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + c), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), halves);
  }
  for (; c < count; ++c) narrow(in[c], out[c]);
}
#endif

// `count` elements as contiguous floats: in the buffer, or in place if they already are contiguous floats.
template <class T, class Float>
[[maybe_unused]] inline const Float* as_floats(const T* in, int64_t stride, Float* buffer, int64_t count) {
  if (stride == 1) {
    widen_row(in, buffer, count);
  } else {
    for (int64_t c = 0; c < count; ++c) buffer[c] = widen(in[c * stride]);
  }
  return buffer;
}

template <class Float>
[[maybe_unused]] inline const Float* as_floats(const Float* in, int64_t stride, Float* buffer, int64_t count) {
  if (stride == 1) return in;
  for (int64_t c = 0; c < count; ++c) buffer[c] = in[c * stride];
  return buffer;
}

// A tensor without channels has no memory, and memset and memcpy do not accept null even for 0 bytes.
template <class T>
[[maybe_unused]] inline void zero_row(T* out, int64_t count) {
  if (count > 0) memset(static_cast<void*>(out), 0, count * sizeof(T));
}

// Rows of the same type are copied bit by bit.
template <class T>
[[maybe_unused]] inline void copy_row(const T* in, int64_t stride, T* out, int64_t count) {
  if (stride == 1) {
    if (count > 0) memcpy(static_cast<void*>(out), in, count * sizeof(T));
  } else {
    for (int64_t c = 0; c < count; ++c) out[c] = in[c * stride];
  }
}

}  // namespace
}  // namespace vidmem
