#include "cpu/select_tokens_kernels.h"

#include "cpu/convert_rows.h"

namespace vidmem {
namespace {

// Elements that are converted through a buffer in the L1 cache.
constexpr int64_t kBlock = 512;

// Sums are kept in double, in lanes whose number is that of no instruction set. Squares of floats are exact there, so
// equal tokens and mere permutations tie, whatever the processor.
constexpr int kLanes = 32;

template <class Float>
inline void add_squares(const Float* in, double* lanes, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += double(in[c + l]) * double(in[c + l]);
  }
  for (; c < count; ++c) lanes[c % kLanes] += double(in[c]) * double(in[c]);
}

template <class T>
void norms(const RowNorms& args, int64_t begin, int64_t end) {
  using Float = typename Accumulate<T>::type;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.rows_per_batch, row = i % args.rows_per_batch;
    const T* in = static_cast<const T*>(args.x) + batch * args.batch_stride + row * args.row_stride;
    double lanes[kLanes] = {};
    Float values[kBlock];
    for (int64_t first = 0; first < args.channels; first += kBlock) {
      const int64_t count = args.channels - first < kBlock ? args.channels - first : kBlock;
      if (args.channel_stride == 1) {
        widen_row(in + first, values, count);
      } else {
        for (int64_t c = 0; c < count; ++c) values[c] = widen(in[(first + c) * args.channel_stride]);
      }
      add_squares(values, lanes, count);
    }
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
