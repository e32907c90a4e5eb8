// Rows of tokens as float, and the feature maps of linear attention on them. For *_kernels.cpp: internal
// linkage, each instruction set keeps its own copy.
#pragma once

#include "cpu/common/lanes.h"
#include "cpu/common/matmul_tile.h"
#include "cpu/linear_attn/linear_attention_kernels.h"

namespace vidmem {
namespace {

// Relative error below 2^-24 before the last rounding; x <= 0 or NaN. Results below 2^-126 are rounded twice.
[[maybe_unused]] inline Floats exp_negative(Floats x) {
  x = x < -104.0f ? Floats{} - 104.0f : x;  // rounds to 0
  const Floats magic = Floats{} + 0x1.8p23f;  // adding it rounds to an integer, which is then in the low bits
  const Floats shifted = x * 0x1.715476p0f + magic;
  const Floats n = shifted - magic;
  const Floats r = x - n * 0x1.62e400p-1f - n * 0x1.7f7d1cp-20f;  // the high part of ln 2 has trailing zero bits
  Floats sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const Ints power = reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic);
  const Ints first = power >> 1;  // 2^power may underflow, so it is applied in two factors
  const Floats low = reinterpret_cast<Floats>((first + 127) << 23);
  const Floats high = reinterpret_cast<Floats>((power - first + 127) << 23);
  return sum * low * high;
}

// NaN stays NaN.
VIDMEM_INLINE Floats relu(Floats x) { return x < 0 ? Floats{} : x; }
VIDMEM_INLINE Floats elu1(Floats x) { return x > 0 ? x + 1 : exp_negative(x > 0 ? Floats{} : x); }

[[maybe_unused]] inline Floats derivative(FeatureMap map, Floats x) {
  const Floats one = Floats{} + 1.0f;
  switch (map) {
    case FeatureMap::relu: return x > 0 ? one : Floats{};
    case FeatureMap::elu1: return exp_negative(x > 0 ? Floats{} : x);
    default: return one;
  }
}

// Writes f(vector) of the tokens [first, first + count) as rows of `pitch` elements, with zeros after the channels.
template <class T, class F>
VIDMEM_INLINE void read_rows(const Tokens& tokens, int64_t first, int64_t count, int64_t channels, float* out,
                             int64_t pitch, const F& f) {
  const T* in = static_cast<const T*>(tokens.data) + first * tokens.token_stride;
  for (int64_t t = 0; t < count; ++t, in += tokens.token_stride, out += pitch) {
    int64_t c = 0;
    if (tokens.channel_stride == 1) {
      for (; c + kFloats <= channels; c += kFloats) store(f(load(in + c)), out + c);
    }
    for (; c < channels; c += kFloats) {
      const int64_t rest = smaller(kFloats, channels - c);
      float some[kFloats] = {};
      for (int64_t i = 0; i < rest; ++i) some[i] = widen(in[(c + i) * tokens.channel_stride]);
      const Floats mapped = f(load(some));
      for (int64_t i = 0; i < rest; ++i) out[c + i] = mapped[i];
      c += rest - kFloats;
    }
    for (; c < pitch; ++c) out[c] = 0;
  }
}

template <class T>
inline void read_tokens(const Tokens& tokens, int64_t first, int64_t count, int64_t channels, float* out,
                        int64_t pitch) {
  read_rows<T>(tokens, first, count, channels, out, pitch, [](Floats x) { return x; });
}

template <class T>
inline void read_features(const Tokens& tokens, FeatureMap map, int64_t first, int64_t count, int64_t channels,
                          float* out, int64_t pitch) {
  switch (map) {
    case FeatureMap::relu:
      return read_rows<T>(tokens, first, count, channels, out, pitch, [](Floats x) { return relu(x); });
    case FeatureMap::elu1:
      return read_rows<T>(tokens, first, count, channels, out, pitch, [](Floats x) { return elu1(x); });
    default: return read_tokens<T>(tokens, first, count, channels, out, pitch);
  }
}

template <class T>
inline void write_row(const float* row, int64_t channels, T* out) {
  int64_t c = 0;
  for (; c + kFloats <= channels; c += kFloats) store(load(row + c), out + c);
  for (; c < channels; ++c) narrow(row[c], out[c]);
}

}  // namespace
}  // namespace vidmem
