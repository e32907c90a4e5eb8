#include "cpu/select_tokens_kernels.h"

#include "cpu/convert_rows.h"
#include "cpu/prefetch.h"

namespace vidmem {
namespace {

// Elements that are converted through a buffer in the L1 cache.
constexpr int64_t kBlock = 512;

// Sums are kept in double, in the same lanes for every instruction set. Squares of floats are exact there and their sum
// errs far less than float32, to which it is rounded: a token and its permutation tie but by rare chance.
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

template <class T>
void norms(const RowNorms& args, int64_t begin, int64_t end) {
  using Float = typename Accumulate<T>::type;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.rows_per_batch, row = i % args.rows_per_batch;
    const T* in = static_cast<const T*>(args.x) + batch * args.batch_stride + row * args.row_stride;
    Lanes sums[kChains] = {};
    Float buffer[kBlock];
    for (int64_t first = 0; first < args.channels; first += kBlock) {
      const int64_t count = args.channels - first < kBlock ? args.channels - first : kBlock;
      const T* block = in + first * args.channel_stride;
      if (args.channel_stride == 1) prefetch(block + args.row_stride, count * sizeof(T));
      add_squares(as_floats(block, args.channel_stride, buffer, count), sums, count);
    }
    const Lanes lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    // Rounded before the root: what is infinite, or zero, in float32 ties as in the reference.
    static_cast<Float*>(args.out)[i] = static_cast<Float>(__builtin_sqrt(static_cast<Float>(sum)));
  }
}

}  // namespace

namespace VIDMEM_ISA {

void row_norms(const RowNorms& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto tag) { norms<typename decltype(tag)::type>(args, begin, end); });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
