// Vectors of the register width of the instruction set that the including kernel file is compiled for: loads widen to
// the type of sums, stores narrow from it, with the rounding of common/numeric.h.
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

constexpr int kFloats = kVectorBytes / 4, kDoubles = kVectorBytes / 8;
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// A vector of S (float or double), and its number of lanes.
template <class S> struct Lanes { using type = Floats; static constexpr int count = kFloats; };
template <> struct Lanes<double> { using type = Doubles; static constexpr int count = kDoubles; };

[[maybe_unused]] inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

[[maybe_unused]] inline Doubles load(const double* p) {
  Doubles v;
  memcpy(&v, p, sizeof v);
  return v;
}

[[maybe_unused]] inline Floats load(const bf16* p) {
  Halves bits;
  memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

[[maybe_unused]] inline Floats load(const fp16* p) {
#if defined(__AVX512F__)
  // The masked forms, because GCC 12 warns of an uninitialised operand inside the plain ones.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Floats v;
  for (int i = 0; i < kFloats; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// The first and the second half of a vector, in double.
typedef float FloatsHalf __attribute__((vector_size(kVectorBytes / 2)));

[[maybe_unused]] inline Doubles lower(Floats v) {
  FloatsHalf half;
  memcpy(&half, &v, sizeof half);
  return __builtin_convertvector(half, Doubles);
}

[[maybe_unused]] inline Doubles upper(Floats v) {
  FloatsHalf half;
  memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof half, sizeof half);
  return __builtin_convertvector(half, Doubles);
}

// By halves, in intrinsics: with shuffles, which GCC compiles badly, causal linear attention took 22.4 ms, not 19.5.
[[maybe_unused]] inline float sum_lanes(Floats v) {
#if defined(__AVX512F__)
  // The masked form, because GCC 12 warns of an uninitialised operand inside the plain one.
  const __m256 x = (__m256)_mm512_maskz_extractf64x4_pd(0xf, (__m512d)v, 1) +
                   (__m256)_mm512_maskz_extractf64x4_pd(0xf, (__m512d)v, 0);
#elif defined(__AVX2__)
  const __m256 x = (__m256)v;
#endif
#if defined(__AVX2__)
  __m128 y = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
  y += _mm_movehl_ps(y, y);
  return y[0] + y[1];
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

[[maybe_unused]] inline double sum_lanes(Doubles v) {
  double sum = 0;
  for (int l = 0; l < kDoubles; ++l) sum += v[l];
  return sum;
}

[[maybe_unused]] inline void store(Floats v, float* p) { memcpy(p, &v, sizeof v); }
[[maybe_unused]] inline void store(Doubles v, double* p) { memcpy(p, &v, sizeof v); }

[[maybe_unused]] inline void store(Floats v, bf16* p) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = reinterpret_cast<Words>(v != v);
  const Halves out = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Halves);
  memcpy(p, &out, sizeof out);
}

// The same for a vector without NaN, a third cheaper.
[[maybe_unused]] inline void store_number(Floats v, bf16* p) {
  const Words bits = reinterpret_cast<Words>(v);
  const Halves out = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
  memcpy(p, &out, sizeof out);
}

[[maybe_unused]] inline void store(Floats v, fp16* p) {
#if defined(__AVX512F__)
  const __m256i out = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), out);
#elif defined(__AVX2__)
  const __m128i out = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), out);
#else
  for (int i = 0; i < kFloats; ++i) narrow(v[i], p[i]);
#endif
}

template <class V, class T>
[[maybe_unused]] inline void store_number(V v, T* p) {
  store(v, p);
}

}  // namespace
}  // namespace vidmem
