#include "cpu/sparse_gather/sparse_gather_kernels.h"

#include "cpu/common/convert_rows.h"
#include "cpu/common/prefetch.h"
#include "cpu/sparse_gather/sum_tiles.h"

namespace vidmem {
namespace {

// Prefetch distance in bytes: rows are scattered in memory, which the hardware prefetcher cannot predict, but the index
// says what comes next. Summing 187,200 random rows of 512 bytes took 2.9 ms without prefetching, 2.3 ms with 4 or
// 8 KiB (and 5.4, 3.6 and 3.3 ms with the sums in the L1 cache instead of registers).
constexpr int64_t kAhead = 8192;

inline int64_t rows_ahead(int64_t row_bytes) {
  const int64_t rows = kAhead / (row_bytes > 0 ? row_bytes : 1);
  return rows < 2 ? 2 : rows > 16 ? 16 : rows;
}

// Elements that are converted through a buffer in the L1 cache.
constexpr int64_t kBlock = 512;

template <class In, class Out>
inline void convert_row(const In* in, int64_t stride, float scale, Out* out, int64_t channels) {
  float values[kBlock];
  for (int64_t first = 0; first < channels; first += kBlock) {
    const int64_t count = channels - first < kBlock ? channels - first : kBlock;
    if (stride == 1) {  // a separate loop, which the compiler vectorises
      for (int64_t c = 0; c < count; ++c) values[c] = widen(in[first + c]) * scale;
    } else {
      for (int64_t c = 0; c < count; ++c) values[c] = widen(in[(first + c) * stride]) * scale;
    }
    narrow_row(values, out + first, count);
  }
}

template <class In>
inline void convert_row(const In* in, int64_t stride, float scale, float* out, int64_t channels) {
  if (stride == 1) {
    for (int64_t c = 0; c < channels; ++c) out[c] = widen(in[c]) * scale;
  } else {
    for (int64_t c = 0; c < channels; ++c) out[c] = widen(in[c * stride]) * scale;
  }
}

// Float rows are not multiplied by 1, which would quieten signalling NaNs and cost a pass for equal types.
template <class In, class Out>
inline void copy_row(const In* in, int64_t stride, Out* out, int64_t channels) {
  using Wide = typename Accumulate<In>::type;
  if (stride != 1) {
    for (int64_t c = 0; c < channels; ++c) narrow(widen(in[c * stride]), out[c]);
    return;
  }
  Wide values[kBlock];
  for (int64_t first = 0; first < channels; first += kBlock) {
    const int64_t count = channels - first < kBlock ? channels - first : kBlock;
    widen_row(in + first, values, count);
    narrow_row(values, out + first, count);
  }
}

template <class In, class Out>
void gather(const GatherRows& args, int64_t begin, int64_t end) {
  const Rows& bank = args.bank;
  const float* scales = static_cast<const float*>(args.scale.data);
  const auto source = [&](int64_t batch, int64_t row) {
    return static_cast<const In*>(bank.data) + batch * bank.batch_stride + row * bank.row_stride;
  };
  const int64_t row_bytes = args.channels * sizeof(In), ahead = rows_ahead(row_bytes);
  int64_t batch = begin / args.rows_per_batch, k = begin % args.rows_per_batch;
  for (int64_t i = begin; i < end; ++i, ++k) {
    if (k == args.rows_per_batch) ++batch, k = 0;
    if (bank.channel_stride == 1 && k + ahead < args.rows_per_batch) {
      const int64_t next = row_at(args.index, batch, k + ahead);
      if (next >= 0) prefetch(source(batch, next), row_bytes < kAhead ? row_bytes : kAhead);
    }
    Out* out = static_cast<Out*>(args.out) + i * args.channels;
    const int64_t row = row_at(args.index, batch, k);
    if (row < 0) {
      zero_row(out, args.channels);
    } else if (scales) {
      const float scale = scales[batch * args.scale.batch_stride + row * args.scale.stride];
      convert_row(source(batch, row), bank.channel_stride, scale, out, args.channels);
    } else {
      copy_row(source(batch, row), bank.channel_stride, out, args.channels);
    }
  }
}

template <class T, class Sum>
inline void add_row(const T* in, int64_t stride, Sum* sums, int64_t count) {
  if (stride == 1) {
    for (int64_t c = 0; c < count; ++c) sums[c] += widen(in[c]);
  } else {
    for (int64_t c = 0; c < count; ++c) sums[c] += widen(in[c * stride]);
  }
}

// Channels are processed in pieces whose sums stay in the L1 cache, so a row of any width needs no heap memory.
constexpr int64_t kPiece = 512;

// Number of sources added to one tile of a piece before the next tile; their pieces stay in the L2 cache.
constexpr int64_t kSources = 32;

template <class T>
void sum(const SumRows& args, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using Sum = typename Accumulate<T>::type;
  Sum sums[kPiece];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / args.output_rows, row = i % args.output_rows;
    const int64_t* offsets = args.offsets + batch * (args.output_rows + 2);
    const int64_t* order = args.order + batch * args.source_rows;
    const T* src = static_cast<const T*>(args.src.data) + batch * args.src.batch_stride;
    T* out = static_cast<T*>(args.out) + i * args.channels;
    const int64_t stride = args.src.channel_stride;
    const int64_t stop = offsets[row + end - i < args.output_rows ? row + end - i : args.output_rows];
    for (int64_t piece = first; piece < last; piece += kPiece) {
      const int64_t width = last - piece < kPiece ? last - piece : kPiece;
      const int64_t piece_bytes = width * sizeof(T), ahead = rows_ahead(piece_bytes);
      const auto source = [&](int64_t k) { return src + order[k] * args.src.row_stride + piece * stride; };
      const auto prefetch_after = [&](int64_t k) {
        if (stride == 1 && k + ahead < stop) prefetch(source(k + ahead), piece_bytes);
      };
      const int64_t count = offsets[row + 1] - offsets[row];
      if (count == 0) {
        zero_row(out + piece, width);
        continue;
      }
      if (count == 1) {  // the usual case for gradients, where few indices repeat
        prefetch_after(offsets[row]);
        copy_row(source(offsets[row]), stride, out + piece, width);
        continue;
      }
      for (int64_t c = 0; c < width; ++c) sums[c] = 0;
      for (int64_t k = offsets[row]; k < offsets[row + 1]; k += kSources) {
        const int64_t sources = offsets[row + 1] - k < kSources ? offsets[row + 1] - k : kSources;
        int64_t added = 0;
        if (stride == 1) {
          added = add_tiles(src + piece, args.src.row_stride, order + k, sources, sums, width,
                            [&](int64_t s) { prefetch_after(k + s); });
        }
        for (int64_t s = 0; added < width && s < sources; ++s) {
          if (added == 0) prefetch_after(k + s);
          add_row(source(k + s) + added * stride, stride, sums + added, width - added);
        }
      }
      narrow_row(sums, out + piece, width);
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

void sum_rows(const SumRows& args, int64_t begin, int64_t end, int64_t first, int64_t last) {
  dispatch_float(args.dtype, [&](auto tag) { sum<typename decltype(tag)::type>(args, begin, end, first, last); });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
