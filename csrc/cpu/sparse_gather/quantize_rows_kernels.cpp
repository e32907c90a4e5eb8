#include "cpu/sparse_gather/quantize_rows_kernels.h"

#include "cpu/common/convert_rows.h"

namespace vidmem {
namespace {

// Elements that are converted through a buffer in the L1 cache.
constexpr int64_t kBlock = 512;

// Magnitudes as integers, which have their order, followed by infinity and NaN.
inline int64_t magnitude(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffffffffff;
}
inline int32_t magnitude(float x) { return static_cast<int32_t>(float_to_bits(x) & 0x7fffffff); }
inline int16_t magnitude(bf16 x) { return static_cast<int16_t>(x.bits & 0x7fff); }
inline int16_t magnitude(fp16 x) { return static_cast<int16_t>(x.bits & 0x7fff); }

inline void from_magnitude(int64_t bits, double& out) { memcpy(&out, &bits, sizeof out); }
inline void from_magnitude(int32_t bits, float& out) { memcpy(&out, &bits, sizeof out); }
inline void from_magnitude(int16_t bits, bf16& out) { out.bits = static_cast<uint16_t>(bits); }
inline void from_magnitude(int16_t bits, fp16& out) { out.bits = static_cast<uint16_t>(bits); }

template <class T> struct Infinity;
template <> struct Infinity<double> { static constexpr int64_t bits = 0x7ff0000000000000; };
template <> struct Infinity<float> { static constexpr int32_t bits = 0x7f800000; };
template <> struct Infinity<bf16> { static constexpr int16_t bits = 0x7f80; };
template <> struct Infinity<fp16> { static constexpr int16_t bits = 0x7c00; };

template <class T> struct Bits { using type = decltype(magnitude(T())); };

template <class T>
typename Bits<T>::type largest(const T* in, int64_t stride, int64_t channels) {
  typename Bits<T>::type found = 0;
  if (stride == 1) {  // a separate loop, which the compiler vectorises
    for (int64_t c = 0; c < channels; ++c) found = magnitude(in[c]) > found ? magnitude(in[c]) : found;
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      found = magnitude(in[c * stride]) > found ? magnitude(in[c * stride]) : found;
    }
  }
  return found;
}

// Largest magnitude of a row dtype.
template <class Q> struct Largest;
template <> struct Largest<int8_t> { static constexpr double value = 127; };
template <> struct Largest<fp8> { static constexpr double value = 448; };

// Smallest and largest scale, see scale_limits of the reference; computed in double as there.
template <class Q, class Float> struct Limits;
template <class Q> struct Limits<Q, float> {
  static constexpr float smallest = 0x1p-126f;
  static constexpr float largest = static_cast<float>(0x1.fffffep127 / Largest<Q>::value * (1 - 0x1p-23));
};
template <class Q> struct Limits<Q, double> {
  static constexpr double smallest = 0x1p-1022;
  static constexpr double largest = 0x1.fffffffffffffp1023 / Largest<Q>::value * (1 - 0x1p-52);
};

// Rounds a magnitude of at most 127.5 to nearest, ties to even, by adding a constant whose lowest bits hold the result.
inline void encode(float x, int8_t& out) { out = static_cast<int8_t>(float_to_bits(x + 0x1.8p23f)); }
inline void encode(double x, int8_t& out) {
  const double shifted = x + 0x1.8p52;
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  out = static_cast<int8_t>(bits);
}

// A magnitude below 464, which rounds to at most 448.
inline void encode(float x, fp8& out) {
  const uint32_t bits = float_to_bits(x), rest = bits & 0x7fffffff;
  const uint32_t subnormal = float_to_bits(bits_to_float(rest) + 0x1p14f) - (141u << 23);  // a unit is 2^-9
  const uint32_t normal = (rest - (120u << 23) + 0x7ffff + ((rest >> 20) & 1)) >> 20;
  out.bits = static_cast<uint8_t>((bits >> 24 & 0x80) | (rest < 121u << 23 ? subnormal : normal));
}
inline void encode(double x, fp8& out) { encode(static_cast<float>(x), out); }  // two roundings, as in torch

template <class Q, class Float>
inline void divide(const Float* in, Float scale, Q* out, int64_t count) {
  for (int64_t c = 0; c < count; ++c) encode(in[c] / scale, out[c]);
}

template <class Q, class T, class Float>
inline void divide_row(const T* in, int64_t stride, Float scale, Q* out, int64_t channels) {
  Float buffer[kBlock];
  for (int64_t first = 0; first < channels; first += kBlock) {
    const int64_t count = channels - first < kBlock ? channels - first : kBlock;
    divide(as_floats(in + first * stride, stride, buffer, count), scale, out + first, count);
  }
}

template <class T, class Q>
void quantize(const QuantizeRows& args, int64_t begin, int64_t end) {
  using Float = typename Accumulate<T>::type;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.rows_per_batch, row = i % args.rows_per_batch;
    const T* in = static_cast<const T*>(args.x.data) + batch * args.x.batch_stride + row * args.x.row_stride;
    Q* out = static_cast<Q*>(args.rows) + i * args.channels;
    Float& scale = static_cast<Float*>(args.scale)[i];
    const auto bits = largest(in, args.x.channel_stride, args.channels);
    if (bits == 0 || bits >= Infinity<T>::bits) {
      scale = bits == 0 ? Float(0) : Float(__builtin_nanf(""));
      zero_row(out, args.channels);
      continue;
    }
    T maximum;
    from_magnitude(bits, maximum);
    scale = widen(maximum) / Float(Largest<Q>::value);
    if (scale < Limits<Q, Float>::smallest) scale = Limits<Q, Float>::smallest;
    if (scale > Limits<Q, Float>::largest) scale = Limits<Q, Float>::largest;
    divide_row(in, args.x.channel_stride, scale, out, args.channels);
  }
}

// The position of the first largest magnitude, or of the first NaN.
template <class T>
int64_t first_largest(const T* in, int64_t stride, int64_t channels) {
  const auto bits = largest(in, stride, channels);
  const auto wanted = bits > Infinity<T>::bits ? Infinity<T>::bits + 1 : bits;
  int64_t c = 0;
  while (magnitude(in[c * stride]) < wanted) ++c;
  return c;
}

template <class T, class Q>
void quantize_backward(const QuantizeRowsBackward& args, int64_t begin, int64_t end) {
  using Float = typename Accumulate<T>::type;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.rows_per_batch, row = i % args.rows_per_batch;
    const T* in = static_cast<const T*>(args.x.data) + batch * args.x.batch_stride + row * args.x.row_stride;
    T* out = static_cast<T*>(args.grad) + i * args.channels;
    zero_row(out, args.channels);
    const int64_t first = first_largest(in, args.x.channel_stride, args.channels);
    const T at = in[first * args.x.channel_stride];
    const Float grad = static_cast<const Float*>(
        args.grad_scale.data)[batch * args.grad_scale.batch_stride + row * args.grad_scale.stride];
    const Float value = widen(at);
    const Float scale = (value < 0 ? -value : value) / Float(Largest<Q>::value);
    Float step = grad * Float((value > 0) - (value < 0)) / Float(Largest<Q>::value);
    if (scale < Limits<Q, Float>::smallest || scale > Limits<Q, Float>::largest) step = 0;  // the scale is clamped
    if (magnitude(at) >= Infinity<T>::bits) step = Float(__builtin_nanf(""));
    narrow(step, out[first]);
  }
}

}  // namespace

namespace VIDMEM_ISA {

void encode_rows(const QuantizeRows& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.rows_dtype == DType::int8 ? quantize<T, int8_t>(args, begin, end) : quantize<T, fp8>(args, begin, end);
  });
}

void encode_rows_backward(const QuantizeRowsBackward& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.rows_dtype == DType::int8 ? quantize_backward<T, int8_t>(args, begin, end)
                                   : quantize_backward<T, fp8>(args, begin, end);
  });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
