// Code shared by the forward and backward pass of attention: packing of rows, small matrix products, exp.
//
// A product is out[column][lane] (+)= sum over i of a[i][column] * b[i][lane]: the vectors of b hold kPackRows<T> rows
// (queries or keys) in their lanes, so that the state of a softmax per row is a vector and needs no shuffles; a is cut
// into panels of kPanel columns, which are broadcast.
//
// For *_kernels.cpp only: everything is internal to one instruction set.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "cpu/common/convert_rows.h"
#include "cpu/common/lanes.h"
#include "cpu/cross_attn/attention_layout.h"

namespace vidmem {
namespace {

#define VIDMEM_INLINE inline __attribute__((always_inline))

// kPanel x kPackVectors accumulators, with their operands, fit the 32 (AVX-512) or 16 registers.
#if defined(__AVX512F__)
constexpr int kPanel = 8;
#elif defined(__AVX2__)
constexpr int kPanel = 6;
#else
constexpr int kPanel = 4;
#endif
constexpr int kPackVectors = 2;
// Sums of more terms than the first constant are split into sums of at most the second number of terms, because one
// running sum would have larger rounding errors than the reference's products; the cost of splitting is negligible.
constexpr int64_t kDepth = 128, kDeepSum = 32;

template <class T> using Vector = typename Lanes<T>::type;
template <class T> constexpr int kWidth = Lanes<T>::count;
template <class T> constexpr int kPackRows = kPackVectors * kWidth<T>;

VIDMEM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T> constexpr T kInfinity = static_cast<T>(__builtin_inff());

typedef uint64_t LongWords __attribute__((vector_size(kVectorBytes)));

// exp to about one rounding; results below the smallest normal number are 0.
VIDMEM_INLINE Floats exp_of(Floats x) {
  const Floats magic = Floats{} + 0x1.8p23f;  // puts the integer nearest to x / log(2) into the lowest bits
  const Floats shifted = x * 0x1.715476p0f + magic;
  const Floats n = shifted - magic;
  const Floats r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // log(2) in two parts; n times the first is exact
  Floats p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  p *= reinterpret_cast<Floats>((reinterpret_cast<Words>(shifted) + 127) << 23);
  p = x < -0x1.5d589ep6f ? Floats{} : p;
  return x > 0x1.61814ap6f ? Floats{} + __builtin_inff() : p;
}

VIDMEM_INLINE Doubles exp_of(Doubles x) {
  const Doubles magic = Doubles{} + 0x1.8p52;
  const Doubles shifted = x * 0x1.71547652b82fep0 + magic;
  const Doubles n = shifted - magic;
  const Doubles r = x - n * 0x1.62e42feep-1 - n * 0x1.a39ef35793c76p-33;
  Doubles p = r * (1.0 / 6227020800) + (1.0 / 479001600);
  p = p * r + (1.0 / 39916800);
  p = p * r + (1.0 / 3628800);
  p = p * r + (1.0 / 362880);
  p = p * r + (1.0 / 40320);
  p = p * r + (1.0 / 5040);
  p = p * r + (1.0 / 720);
  p = p * r + (1.0 / 120);
  p = p * r + (1.0 / 24);
  p = p * r + (1.0 / 6);
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  p *= reinterpret_cast<Doubles>((reinterpret_cast<LongWords>(shifted) + 1023) << 52);
  p = x < -708.0 ? Doubles{} : p;
  return x > 709.0 ? Doubles{} + __builtin_inf() : p;
}

// An 8-bit row times its scale, in the buffer.
template <class E>
VIDMEM_INLINE const float* scaled_row(const AttentionRows& rows, int64_t row, float* buffer) {
  as_floats(static_cast<const E*>(rows.data) + row * rows.row_stride, rows.channel_stride, buffer, rows.channels);
  const float scale = rows.scales[row * rows.scale_stride];
  for (int64_t c = 0; c < rows.channels; ++c) buffer[c] *= scale;
  return buffer;
}

// Row `row`, widened in the buffer, or in place.
template <class T>
VIDMEM_INLINE const T* row_of(const AttentionRows& rows, int64_t row, T* buffer) {
  const int64_t offset = row * rows.row_stride;
  if constexpr (sizeof(T) == 8) {
    return as_floats(static_cast<const double*>(rows.data) + offset, rows.channel_stride, buffer, rows.channels);
  } else {
    switch (rows.dtype) {
      case DType::bfloat16:
        return as_floats(static_cast<const bf16*>(rows.data) + offset, rows.channel_stride, buffer, rows.channels);
      case DType::float16:
        return as_floats(static_cast<const fp16*>(rows.data) + offset, rows.channel_stride, buffer, rows.channels);
      case DType::int8: return scaled_row<int8_t>(rows, row, buffer);
      case DType::float8_e4m3fn: return scaled_row<fp8>(rows, row, buffer);
      default:
        return as_floats(static_cast<const float*>(rows.data) + offset, rows.channel_stride, buffer, rows.channels);
    }
  }
}

// Converts a row to the dtype of the results.
template <class T>
VIDMEM_INLINE void write_row(const T* row, DType dtype, void* out, int64_t offset, int64_t channels) {
  if constexpr (sizeof(T) == 8) {
    copy_row(row, 1, static_cast<double*>(out) + offset, channels);
  } else {
    switch (dtype) {
      case DType::bfloat16: return narrow_row(row, static_cast<bf16*>(out) + offset, channels);
      case DType::float16: return narrow_row(row, static_cast<fp16*>(out) + offset, channels);
      default: copy_row(row, 1, static_cast<float*>(out) + offset, channels);
    }
  }
}

// Rows index[0 .. count) as out[row / width][channel][row % width], the last ones filled up with zeros.
template <class T>
inline void pack_transposed(const AttentionRows& rows, const int32_t* index, int64_t count, int width, T* buffer,
                            T* __restrict out) {
  const int64_t channels = rows.channels;
  for (int64_t first = 0; first < count; first += width, out += channels * width) {
    for (int j = 0; j < width; ++j) {
      if (first + j < count) {
        const T* row = row_of(rows, index[first + j], buffer);
        for (int64_t c = 0; c < channels; ++c) out[c * width + j] = row[c];
      } else {
        for (int64_t c = 0; c < channels; ++c) out[c * width + j] = 0;
      }
    }
  }
}

// Rows index[0 .. count) as out[channel / kPanel][row][channel % kPanel], the last channels filled up with zeros.
template <class T>
inline void pack_panels(const AttentionRows& rows, const int32_t* index, int64_t count, T* buffer, T* __restrict out) {
  const int64_t channels = rows.channels, whole = channels / kPanel * kPanel;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = row_of(rows, index[i], buffer);
    T* to = out + i * kPanel;
    int64_t c = 0;
    for (; c < whole; c += kPanel, to += count * kPanel) {
      for (int j = 0; j < kPanel; ++j) to[j] = row[c + j];
    }
    if (c == channels) continue;
    for (int j = 0; j < kPanel; ++j) to[j] = c + j < channels ? row[c + j] : 0;
  }
}

// out[j][lane] (+)= sum over i < depth of a[i * a_row + j * a_column] * b[i * b_row + lane] for j < kPanel and the
// lanes of kPackVectors vectors. The previous content is added last: one running sum over thousands of keys would have
// several times the rounding error of the reference's products.
template <class T, bool kAdd>
VIDMEM_INLINE void multiply_tile(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, int64_t depth,
                                 T* out, int64_t out_row) {
  using V = Vector<T>;
  V sum[kPanel][kPackVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kPanel; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kPackVectors; ++v) sum[j][v] = V{};
  }
  for (int64_t i = 0; i < depth; ++i, a += a_row, b += b_row) {
    V row[kPackVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kPackVectors; ++v) row[v] = load(b + v * kWidth<T>);
#pragma GCC unroll 8
    for (int j = 0; j < kPanel; ++j) {
      const V x = a[j * a_column] - V{};  // a broadcast
#pragma GCC unroll 2
      for (int v = 0; v < kPackVectors; ++v) sum[j][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kPanel; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kPackVectors; ++v) {
      T* to = out + j * out_row + v * kWidth<T>;
      store(kAdd ? load(to) + sum[j][v] : sum[j][v], to);
    }
  }
}

// multiply_tile of a panel and a pack, split recursively in halves until a running sum is short.
template <class T>
__attribute__((noinline)) void multiply_deep(const T* panel, const T* pack, int64_t depth, T* out) {
  constexpr int64_t kRows = kPackRows<T>;
  if (depth <= kDeepSum) return multiply_tile<T, false>(panel, kPanel, 1, pack, kRows, depth, out, kRows);
  const int64_t half = depth / 2;
  alignas(64) T rest[kPanel * kRows];
  multiply_deep(panel, pack, half, out);
  multiply_deep(panel + half * kPanel, pack + half * kRows, depth - half, rest);
  for (int64_t i = 0; i < kPanel * kRows; i += kWidth<T>) store(load(out + i) + load(rest + i), out + i);
}

// The same for all `columns` of a, panels[column / kPanel][depth][kPanel], and one pack b[depth][lane].
template <class T, bool kAdd>
inline void multiply_panels(const T* panels, int64_t columns, const T* pack, int64_t depth, T* out) {
  if (!kAdd && depth > kDepth) {  // with kAdd, depth is that of a tile
    for (int64_t j = 0; j < columns; j += kPanel, panels += depth * kPanel, out += kPanel * kPackRows<T>) {
      multiply_deep(panels, pack, depth, out);
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kPanel, panels += depth * kPanel, out += kPanel * kPackRows<T>) {
    multiply_tile<T, kAdd>(panels, kPanel, 1, pack, kPackRows<T>, depth, out, kPackRows<T>);
  }
}

// --- NaN and infinities ---
// A weight of 0 does not hide them: values that some lanes of a product must not see are left out of the product and
// added to the other lanes one by one.

template <class T>
VIDMEM_INLINE bool is_special(T x) { return !(x - x == 0); }

template <class T>
inline bool any_special(const T* x, int64_t count) {
  using V = Vector<T>;
  auto found = V{} != V{};
  int64_t i = 0;
  for (; i + kWidth<T> <= count; i += kWidth<T>) {
    const V some = load(x + i);
    found |= some - some != V{};
  }
  bool any = false;
  for (; i < count; ++i) any |= is_special(x[i]);
  for (int l = 0; l < kWidth<T>; ++l) any |= found[l] != 0;
  return any;
}

// Replaces them by zeros; returns whether there were any.
template <class T>
inline bool drop_special(T* x, int64_t count) {
  if (!any_special(x, count)) return false;
  for (int64_t i = 0; i < count; ++i) x[i] = is_special(x[i]) ? 0 : x[i];
  return true;
}

// The pairs of a pack and a tile that a window leaves visible.
enum class Seen { none, some, all };

// Cuts scratch memory into arrays that begin on a cache line.
struct Arena {
  char* at;

  template <class T>
  T* take(int64_t count) {
    T* const array = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }
};

}  // namespace
}  // namespace vidmem
