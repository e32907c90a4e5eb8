#include "cpu/sparse_gather_kernels.h"

namespace vidmem {
namespace {

template <class In, class Out>
inline void convert_row(const In* in, int64_t stride, float scale, Out* out, int64_t channels) {
  if (stride == 1) {  // its own loop: the compiler vectorises it
    for (int64_t c = 0; c < channels; ++c) narrow(widen(in[c]) * scale, out[c]);
  } else {
    for (int64_t c = 0; c < channels; ++c) narrow(widen(in[c * stride]) * scale, out[c]);
  }
}

// Float rows are not multiplied by 1: that would quieten signalling NaNs and cost a pass for equal types.
template <class In, class Out>
inline void copy_row(const In* in, int64_t stride, Out* out, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) narrow(widen(in[c * stride]), out[c]);
}

template <class T>
inline void copy_row(const T* in, int64_t stride, T* out, int64_t channels) {
  if (stride == 1) {
    memcpy(out, in, channels * sizeof(T));
  } else {
    for (int64_t c = 0; c < channels; ++c) out[c] = in[c * stride];
  }
}

template <class In, class Out>
void gather(const GatherRows& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Out* out = static_cast<Out*>(args.out) + i * args.channels;
    const int64_t row = args.index[i];
    if (row < 0) {
      memset(static_cast<void*>(out), 0, args.channels * sizeof(Out));
      continue;
    }
    const int64_t batch = i / args.rows_per_batch;
    const In* in = static_cast<const In*>(args.bank) + batch * args.batch_stride + row * args.row_stride;
    if (args.scale) {
      const float scale = args.scale[batch * args.scale_batch_stride + row * args.scale_row_stride];
      convert_row(in, args.channel_stride, scale, out, args.channels);
    } else {
      copy_row(in, args.channel_stride, out, args.channels);
    }
  }
}

// Channels are taken in pieces whose sums stay in the L1 cache, so a row of any width needs one pass and no heap.
constexpr int64_t kPiece = 512;

template <class T>
void sum(const SumRows& args, int64_t begin, int64_t end) {
  using Sum = typename Accumulate<T>::type;
  Sum sums[kPiece];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.output_rows, row = i % args.output_rows;
    const int64_t* offsets = args.offsets + batch * (args.output_rows + 1);
    const int64_t* order = args.order + batch * args.source_rows;
    const T* src = static_cast<const T*>(args.src) + batch * args.batch_stride;
    T* out = static_cast<T*>(args.out) + i * args.channels;
    const int64_t count = offsets[row + 1] - offsets[row];
    if (count == 0) {
      memset(static_cast<void*>(out), 0, args.channels * sizeof(T));
      continue;
    }
    if (count == 1) {  // most rows of a gradient that hardly repeats an index
      copy_row(src + order[offsets[row]] * args.row_stride, args.channel_stride, out, args.channels);
      continue;
    }
    for (int64_t first = 0; first < args.channels; first += kPiece) {
      const int64_t width = args.channels - first < kPiece ? args.channels - first : kPiece;
      for (int64_t c = 0; c < width; ++c) sums[c] = 0;
      for (int64_t k = offsets[row]; k < offsets[row + 1]; ++k) {
        const T* in = src + order[k] * args.row_stride + first * args.channel_stride;
        if (args.channel_stride == 1) {
          for (int64_t c = 0; c < width; ++c) sums[c] += widen(in[c]);
        } else {
          for (int64_t c = 0; c < width; ++c) sums[c] += widen(in[c * args.channel_stride]);
        }
      }
      for (int64_t c = 0; c < width; ++c) narrow(sums[c], out[first + c]);
    }
  }
}

}  // namespace

namespace VIDMEM_ISA {

void gather_rows(const GatherRows& args, int64_t begin, int64_t end) {
  dispatch_storage(args.bank_dtype, [&](auto in) {
    dispatch_float(args.out_dtype, [&](auto out) {
      gather<typename decltype(in)::type, typename decltype(out)::type>(args, begin, end);
    });
  });
}

void sum_rows(const SumRows& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto tag) { sum<typename decltype(tag)::type>(args, begin, end); });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
