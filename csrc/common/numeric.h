// Conversions between float and the storage types, safe to compile per instruction set (internal linkage, no
// header of torch or the standard library behind them).
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace vidmem {
namespace {  // internal linkage: each instruction set keeps its own copy

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct fp8 { uint8_t bits; };  // e4m3fn

[[maybe_unused]] inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] inline double widen(double x) { return x; }
[[maybe_unused]] inline float widen(float x) { return x; }
[[maybe_unused]] inline float widen(int8_t x) { return static_cast<float>(x); }
[[maybe_unused]] inline float widen(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

[[maybe_unused]] inline float widen(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(x.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return bits_to_float(sign | rest | 0x7f800000);  // infinity, NaN
  // The exponent's bias changes from 15 to 127, without a float32 subnormal on the way, which may be flushed to zero.
  const float value = rest < 0x00800000 ? float(x.bits & 0x3ff) * 0x1p-24f : bits_to_float(rest + (112u << 23));
  return bits_to_float(sign | float_to_bits(value));
#endif
}

// Without branches, so that the compiler vectorises loops.
[[maybe_unused]] inline float widen(fp8 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24;
  const uint32_t rest = uint32_t(x.bits & 0x7f) << 20;
  // m * 2^-9 as 2^-6 * (1 + m / 8) - 2^-6.
  const uint32_t subnormal = float_to_bits(bits_to_float(rest | (121u << 23)) - 0x1p-6f);
  const uint32_t finite = rest < 0x00800000 ? subnormal : rest + (120u << 23);
  return bits_to_float(sign | (rest == 0x07f00000 ? 0x7fc00000 : finite));  // one NaN, no infinity
}

[[maybe_unused]] inline void narrow(double x, double& out) { out = x; }
[[maybe_unused]] inline void narrow(float x, double& out) { out = x; }
[[maybe_unused]] inline void narrow(float x, float& out) { out = x; }
[[maybe_unused]] inline void narrow(double x, float& out) { out = static_cast<float>(x); }

[[maybe_unused]] inline void narrow(float x, bf16& out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // nearest, ties to even
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

[[maybe_unused]] inline void narrow(float x, fp16& out) {
#if defined(__F16C__)
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out.bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds past 65504
    out.bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000) {   // subnormal: let the FPU round at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out.bits = sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000);
  } else {
    out.bits = sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
  }
#endif
}

[[maybe_unused]] inline void narrow(double x, bf16& out) { narrow(static_cast<float>(x), out); }
[[maybe_unused]] inline void narrow(double x, fp16& out) { narrow(static_cast<float>(x), out); }

// The type of sums: float, or double for double.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

}  // namespace
}  // namespace vidmem
