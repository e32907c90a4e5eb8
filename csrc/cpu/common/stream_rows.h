// Copies that bypass the caches. For *_kernels.cpp: internal linkage, each instruction set keeps its own copy.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace vidmem {
namespace {

// A result too large for the caches need not be read into them before it is written.
constexpr int64_t kStreamBytes = 8 << 20;

// Copies bytes with stores that bypass the caches where alignment allows; call stream_end() before reading the result.
[[maybe_unused]] inline void stream_row(const void* in, void* out, int64_t bytes) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  using Vector = __m512i;
#elif defined(__AVX2__)
  using Vector = __m256i;
#else
  using Vector = __m128i;
#endif
  constexpr int64_t kWide = sizeof(Vector);
  if (reinterpret_cast<uintptr_t>(out) % kWide == 0 && bytes % kWide == 0) {
    for (int64_t c = 0; c < bytes; c += kWide) {
      Vector v;
      memcpy(&v, static_cast<const char*>(in) + c, kWide);
      auto* to = reinterpret_cast<Vector*>(static_cast<char*>(out) + c);
#if defined(__AVX512F__)
      _mm512_stream_si512(to, v);
#elif defined(__AVX2__)
      _mm256_stream_si256(to, v);
#else
      _mm_stream_si128(to, v);
#endif
    }
    return;
  }
#endif
  memcpy(out, in, bytes);
}

// Orders streamed stores before the stores that signal other threads that the work is done.
[[maybe_unused]] inline void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace vidmem
