#include "cpu/sparse_gather/select_tokens_kernels.h"

#include "cpu/common/convert_rows.h"
#include "cpu/common/prefetch.h"

namespace vidmem {
namespace {

// Elements that are converted through a buffer in the L1 cache.
constexpr int64_t kBlock = 512;

// Sums are kept in double, in the same lanes for every instruction set. Squares of floats are exact in double, and the
// error of their sum is far below float32, to which it is rounded: a token and its permutation nearly always tie.
constexpr int kLanes = 8, kChains = 4;
typedef double Lanes __attribute__((vector_size(8 * kLanes)));

template <class Float>
inline void add_squares(const Float* in, Lanes (&sums)[kChains], int64_t count) {
  typedef Float Values __attribute__((vector_size(kLanes * sizeof(Float))));
  int64_t c = 0;
  for (; c + kLanes * kChains <= count; c += kLanes * kChains) {
    for (int i = 0; i < kChains; ++i) {
      Values values;
      memcpy(&values, in + c + i * kLanes, sizeof values);
      const Lanes wide = __builtin_convertvector(values, Lanes);
      sums[i] += wide * wide;
    }
  }
  for (; c < count; ++c) sums[c / kLanes % kChains][c % kLanes] += double(in[c]) * double(in[c]);
}

template <class Int, class Float>
inline Int bits_of(Float x) {
  Int bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class Float, class Int>
inline Float from_bits(Int bits) {
  Float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A number that orders like norm * 2^power, which itself may exceed the range of Float: norm * 2^power * 2^-64, or a
// negative number if even that underflows. NaN and infinity are unchanged.
template <class Float>
inline Float score_of(Float norm, int64_t power) {
  using Int = std::conditional_t<sizeof(Float) == 8, int64_t, int32_t>;
  constexpr int mantissa = sizeof(Float) == 8 ? 52 : 23;
  if (norm == 0) return -1;
  if (norm - norm != 0) return norm;
  const Int key = bits_of<Int>(norm) + static_cast<Int>(power - 64) * (Int(1) << mantissa);
  return key >= 0 ? from_bits<Float>(key) : -from_bits<Float>(static_cast<Int>(-key));
}

// 2^exponent, for exponents from -1022 to 1023.
inline double power_of_two(int64_t exponent) { return from_bits<double>((exponent + 1023) << 52); }

inline double total_of(const Lanes (&sums)[kChains]) {
  const Lanes lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// The sum of squares of floats neither overflows nor underflows in double.
template <class T, class Row>
inline float score_of_row(float, double sum, const T*, const Row&) {
  if (sum == 0 || sum - sum != 0) return score_of(static_cast<float>(__builtin_sqrt(sum)), 0);
  const int64_t exponent = (bits_of<int64_t>(sum) >> 52) - 1023, half = exponent >> 1;
  // Rounded before the root, so that norms tie as in the reference.
  const float near_one = static_cast<float>(sum * power_of_two(-2 * half));
  return score_of(static_cast<float>(__builtin_sqrt(near_one)), half);
}

// That of doubles may; then it is computed again, scaled by a power of two.
template <class T, class Row>
inline double score_of_row(double, double sum, const T* in, const Row& args) {
  if (sum >= 0x1p-900 && sum - sum == 0) return score_of(__builtin_sqrt(sum), 0);
  int64_t peak = 0;  // bits of magnitudes, which have their order, with NaN above infinity
  for (int64_t c = 0; c < args.channels; ++c) {
    const int64_t bits = bits_of<int64_t>(double(in[c * args.x.channel_stride])) & 0x7fffffffffffffff;
    peak = bits > peak ? bits : peak;
  }
  if (peak == 0 || peak >= 0x7ff0000000000000) return score_of(from_bits<double>(peak), 0);
  const int64_t exponent = peak >> 52 > 0 ? peak >> 52 : 1;
  const double power = power_of_two(1024 - exponent);
  double scaled[kBlock];
  Lanes sums[kChains] = {};
  for (int64_t first = 0; first < args.channels; first += kBlock) {
    const int64_t count = args.channels - first < kBlock ? args.channels - first : kBlock;
    for (int64_t c = 0; c < count; ++c) scaled[c] = double(in[(first + c) * args.x.channel_stride]) * power;
    add_squares(scaled, sums, count);
  }
  return score_of(__builtin_sqrt(total_of(sums)), exponent - 1024);
}

template <class T>
void norms(const RowNorms& args, int64_t begin, int64_t end) {
  using Float = typename Accumulate<T>::type;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.rows_per_batch, row = i % args.rows_per_batch;
    const T* in = static_cast<const T*>(args.x.data) + batch * args.x.batch_stride + row * args.x.row_stride;
    Lanes sums[kChains] = {};
    Float buffer[kBlock];
    for (int64_t first = 0; first < args.channels; first += kBlock) {
      const int64_t count = args.channels - first < kBlock ? args.channels - first : kBlock;
      const T* block = in + first * args.x.channel_stride;
      if (args.x.channel_stride == 1) prefetch(block + args.x.row_stride, count * sizeof(T));
      add_squares(as_floats(block, args.x.channel_stride, buffer, count), sums, count);
    }
    static_cast<Float*>(args.out)[i] = score_of_row(Float(), total_of(sums), in, args);
  }
}

}  // namespace

namespace VIDMEM_ISA {

void row_norms(const RowNorms& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto tag) { norms<typename decltype(tag)::type>(args, begin, end); });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
