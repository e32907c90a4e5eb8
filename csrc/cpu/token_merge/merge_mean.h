// The mean of a group, measured from one of its tokens as in the reference. For *_kernels.cpp: internal linkage, each
// instruction set keeps its own copy.
#pragma once

#include "cpu/common/lanes.h"
#include "cpu/token_merge/merge_groups.h"

namespace vidmem {
namespace {

constexpr int kBatch = 4;  // rows added in one pass, with their sum in registers

// Division by the size of a group; a power of two, such as the size of a pair, divides exactly by a product.
template <class S>
struct Divisor {
  S total, inverse;
  bool is_power;

  explicit Divisor(S by) : total(by), inverse(0), is_power(false) {
    constexpr S least = sizeof(S) == 4 ? S(0x1p-126) : S(0x1p-1022), most = sizeof(S) == 4 ? S(0x1p126) : S(0x1p1022);
    if (!(by >= least && by <= most)) return;
    if constexpr (sizeof(S) == 4) {
      is_power = (float_to_bits(by) & 0x7fffff) == 0;
      inverse = bits_to_float(0x7f000000 - float_to_bits(by));
    } else {
      uint64_t bits;
      memcpy(&bits, &by, sizeof bits);
      is_power = (bits & 0xfffffffffffff) == 0;
      bits = 0x7fe0000000000000 - bits;
      memcpy(&inverse, &bits, sizeof inverse);
    }
  }
};

// sums = start + (origin - rows[0]) * weight[0] + ..., from left to right, where start may be null. With kLast: out =
// origin - sums / total instead; returns whether all values are certainly finite, which holds if their sum is.
template <int K, bool kSized, bool kLast, bool kPower, class T, class S, class Out>
inline bool add_deviations(const T* origin, const T* const* in, const S* weights, const S* start, const Divisor<S>& by,
                           Out* out, int64_t channels) {
  using Vector = typename Lanes<S>::type;
  constexpr int lanes = Lanes<S>::count;
  const T* rows[K];
  S weight[K];
  for (int k = 0; k < K; ++k) {
    rows[k] = in[k];
    weight[k] = kSized ? weights[k] : S(1);
  }
  Vector rests[2] = {};  // two, so that additions need not wait for each other
  const auto vector_at = [&](int64_t c, Vector& rest) {
    const Vector from = load(origin + c);
    Vector sum = start ? load(start + c) : Vector{};
    for (int k = 0; k < K; ++k) {
      const Vector by_row = from - load(rows[k] + c);
      sum += kSized ? by_row * weight[k] : by_row;
    }
    if (kLast) {
      sum = from - (kPower ? sum * by.inverse : sum / by.total);
      rest += sum;
      store_number(sum, out + c);  // a NaN is written again
    } else {
      store(sum, out + c);
    }
  };
  int64_t c = 0;
  for (; c + 2 * lanes <= channels; c += 2 * lanes) {
    vector_at(c, rests[0]);
    vector_at(c + lanes, rests[1]);
  }
  for (; c + lanes <= channels; c += lanes) vector_at(c, rests[0]);
  S rest = 0;
  for (; c < channels; ++c) {
    const S from = widen(origin[c]);
    S sum = start ? start[c] : S(0);
    for (int k = 0; k < K; ++k) {
      const S by_row = from - widen(rows[k][c]);
      sum += kSized ? by_row * weight[k] : by_row;
    }
    if (kLast) {
      sum = from - (kPower ? sum * by.inverse : sum / by.total);
      rest += sum;
    }
    narrow(sum, out[c]);
  }
  rest += sum_lanes(rests[0] + rests[1]);
  return rest - rest == 0;
}

template <bool kSized, bool kLast, bool kPower, class T, class S, class Out>
inline bool add_deviations(int count, const T* origin, const T* const* in, const S* weights, const S* start,
                           const Divisor<S>& by, Out* out, int64_t channels) {
  switch (count) {
    case 1: return add_deviations<1, kSized, kLast, kPower>(origin, in, weights, start, by, out, channels);
    case 2: return add_deviations<2, kSized, kLast, kPower>(origin, in, weights, start, by, out, channels);
    case 3: return add_deviations<3, kSized, kLast, kPower>(origin, in, weights, start, by, out, channels);
    default: return add_deviations<kBatch, kSized, kLast, kPower>(origin, in, weights, start, by, out, channels);
  }
}

// A power of two that scales sizes with a total below 1 to a total of about 1, so that no product underflows.
inline float scale_up(float total) {
  return total < 1 ? bits_to_float((254 - (float_to_bits(total) >> 23)) << 23) : 1;
}
inline double scale_up(double total) {
  uint64_t bits;
  memcpy(&bits, &total, sizeof bits);
  bits = (2046 - (bits >> 52)) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return total < 1 ? power : 1;
}

inline float largest_of(float) { return 0x1.fffffep127f; }
inline double largest_of(double) { return 0x1.fffffffffffffp1023; }

// One channel of a mean, computed like the reference if deviations may overflow.
template <class S, class T, class Index>
S mean_at(const T* src, int64_t row_stride, const Group<Index>& group, const Sizes<S>& size, int64_t origin, S total) {
  const S from = widen(src[origin * row_stride]);
  const S up = scale_up(total);
  S sum = 0, half = 0;
  for (int64_t k = 0; k < group.count; ++k) {
    const S weight = size[group[k]], value = widen(src[group[k] * row_stride]);
    if (weight == 0) continue;
    sum += (from - value) * (weight * up);
    const S share = size.share(group[k], total) * S(0.5);
    half += share == 0 && value - value != 0 ? value : value * share;  // infinity, even if the share rounds to 0
  }
  const S mean = from - sum / (total * up);
  if (mean - mean == 0) return mean;
  const S most = largest_of(half);
  const S doubled = half * 2;
  if (half - half != 0) return doubled;  // infinity or NaN
  return doubled > most ? most : doubled < -most ? -most : doubled;
}

}  // namespace
}  // namespace vidmem
