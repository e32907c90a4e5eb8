#include "cpu/sparse_gather/topk_blocks_kernels.h"

#include "cpu/common/score_tile.h"

namespace vidmem {
namespace {

// Adds `count` rows to a sum, in order, four at a time to save loads and stores of the sum.
template <class T>
VIDMEM_INLINE void add_rows(const T* rows, int64_t stride, int64_t count, int64_t channels, T* __restrict sum) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4, rows += 4 * stride) {
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] = sum[c] + rows[c] + rows[stride + c] + rows[2 * stride + c] + rows[3 * stride + c];
    }
  }
  for (; r < count; ++r, rows += stride) {
    for (int64_t c = 0; c < channels; ++c) sum[c] += rows[c];
  }
}

// Whole rows of all heads in turn, in memory order.
template <class T>
void run_mean_blocks(const MeanBlocks& args, int64_t begin, int64_t end) {
  const HeadRows& x = args.x;
  T* extra = static_cast<T*>(args.scratch);
  const bool direct = x.channel_stride == 1 && (args.dtype == DType::float32 || args.dtype == DType::float64);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / args.num_blocks, block = i % args.num_blocks, first = block * args.block;
    const int64_t last = args.length - first < args.block ? args.length : first + args.block;
    T* means = static_cast<T*>(args.means) + (b * args.heads * args.num_blocks + block) * args.channels;
    const int64_t head_size = args.num_blocks * args.channels;
    for (int64_t row = first, some; row < last; row += some) {
      some = row == first ? 1 : direct ? (last - row < 4 ? last - row : 4) : 1;
      for (int64_t h = 0; h < args.heads; ++h) {
        const int64_t offset = b * x.batch_stride + row * x.row_stride + h * x.head_stride;
        T* sum = means + h * head_size;
        if (row == first) {
          read_row(x.data, args.dtype, offset, x.channel_stride, args.channels, sum);
        } else if (direct) {
          add_rows(static_cast<const T*>(x.data) + offset, x.row_stride, some, args.channels, sum);
        } else {
          read_row(x.data, args.dtype, offset, x.channel_stride, args.channels, extra);
          add_rows(extra, 0, 1, args.channels, sum);
        }
      }
    }
    for (int64_t h = 0; h < args.heads; ++h) {
      for (int64_t c = 0; c < args.channels; ++c) means[h * head_size + c] /= static_cast<T>(last - first);
    }
  }
}

// Rows first .. first + kColumns - 1; rows from `end` on are NaN, which is never chosen.
template <class T>
inline void pack_rows(const ScoreRows& rows, int64_t first, int64_t end, T* scratch, T* out, int64_t stride) {
  const int64_t pitch = padded_row(rows.channels);
  for (int j = 0; j < kColumns; ++j) {
    T* row = scratch + j * pitch;
    if (first + j < end) {
      const int64_t offset = (first + j) * rows.row_stride;
      read_row(rows.data, rows.dtype, offset, rows.channel_stride, rows.channels, row);
    } else {
      for (int64_t c = 0; c < rows.channels; ++c) row[c] = static_cast<T>(__builtin_nanf(""));
    }
  }
  interleave(scratch, pitch, rows.channels, out, stride);
}

template <class T>
void run_pack_keys(const PackKeys& args, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    T* panel = static_cast<T*>(args.panels) + p * args.keys.channels * kColumns;
    pack_rows(args.keys, p * kColumns, args.keys.count, static_cast<T*>(args.scratch), panel, kColumns);
  }
}

// A bit for each lane in which a > b.
template <class T>
VIDMEM_INLINE uint32_t lanes_above(const typename Simd<T>::V& a, const typename Simd<T>::V& b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)(a > b));
  else return _mm256_movemask_pd((__m256d)(a > b));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kWidth<T>; ++l) bits |= uint32_t(a[l] > b[l]) << l;
  return bits;
#endif
}

// Inserts a column into a list of k, best first, after all that are at least as good, and drops the last one. Moves
// whole vectors from the end; the only branch on values is at the first vector that does not change. kRowPad entries of
// infinity precede the list. NaN marks an empty place.
template <class T>
VIDMEM_INLINE void insert_sorted(T* value, typename Simd<T>::Int* index, int64_t k, T score, int64_t column) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  const V scores = score - V{};
  const I columns = I{} + static_cast<typename Simd<T>::Int>(column);
  for (int64_t i = k - kWidth<T>;; i -= kWidth<T>) {
    const V here = load<V>(value + i), before = load<V>(value + i - 1);
    const I number = load<I>(index + i), number_before = load<I>(index + i - 1);
    const I stays = here >= scores, is_next = before >= scores;
    store(value + i, V(stays ? here : is_next ? scores : before));
    store(index + i, I(stays ? number : is_next ? columns : number_before));
    if (value[i - 1] >= score) return;
  }
}

// The same columns as a heap with the worst on top (of equal ones the last), for values of k at which a list is slower.
constexpr int64_t kLongestList = 256;

template <class T>
struct Heap {
  using Int = typename Simd<T>::Int;
  T* value;
  Int* index;

  bool is_worse(int64_t a, int64_t b) const {
    return value[a] < value[b] || (value[a] == value[b] && index[a] > index[b]);
  }

  void swap(int64_t a, int64_t b) {
    const T v = value[a];
    const Int i = index[a];
    value[a] = value[b];
    index[a] = index[b];
    value[b] = v;
    index[b] = i;
  }

  void sink(int64_t size) {
    for (int64_t at = 0, child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && is_worse(child + 1, child)) ++child;
      if (!is_worse(child, at)) return;
      swap(at, child);
    }
  }

  void push(int64_t size, T score, int64_t column) {
    value[size] = score;
    index[size] = static_cast<Int>(column);
    for (int64_t at = size; at > 0 && is_worse(at, (at - 1) / 2); at = (at - 1) / 2) swap(at, (at - 1) / 2);
  }

  void replace_worst(int64_t size, T score, int64_t column) {
    value[0] = score;
    index[0] = static_cast<Int>(column);
    sink(size);
  }

  void sort(int64_t size) {  // best first
    for (int64_t last = size - 1; last > 0; --last) {
      swap(0, last);
      sink(last);
    }
  }
};

// The k best columns of every row of a pack. Once there are k columns, most tiles contain no better one.
template <class T>
struct BestK {
  using V = typename Simd<T>::V;
  T* limit;  // the worst of the k, per lane
  T* value;  // k per lane, a list or a heap, `pitch` from lane to lane
  typename Simd<T>::Int* index;
  int64_t k, pitch, lanes;  // lanes with a row; the scores of the other lanes are NaN

  template <int P>
  VIDMEM_INLINE void take(int64_t column, const Tile<T, P>& score) {
    uint32_t any = column < k;
#pragma GCC unroll 12
    for (int j = 0; j < P * kColumns; ++j) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) any |= lanes_above<T>(score[j][v], load<V>(limit + v * kWidth<T>));
    }
    if (__builtin_expect(any == 0, 1)) return;
    T scores[P * kColumns * kLanes<T>];
#pragma GCC unroll 12
    for (int j = 0; j < P * kColumns; ++j) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) store(scores + j * kLanes<T> + v * kWidth<T>, score[j][v]);
    }
    insert(scores, column, P * kColumns);
  }

  VIDMEM_INLINE void put(int l, T score, int64_t column) {
    T* values = value + l * pitch;
    auto* numbers = index + l * pitch;
    if (k <= kLongestList) {
      insert_sorted(values, numbers, k, score, column);
      limit[l] = values[k - 1];
      return;
    }
    Heap<T> heap{values, numbers};
    if (column < k) {
      heap.push(column, score, column);
    } else {
      heap.replace_worst(k, score, column);
    }
    limit[l] = values[0];
  }

  __attribute__((noinline)) void insert(const T* scores, int64_t column, int columns) {
    for (int j = 0; j < columns; ++j, ++column, scores += kLanes<T>) {
      if (column < k) {
        for (int l = 0; l < lanes; ++l) {
          const T score = scores[l] == scores[l] ? scores[l] : static_cast<T>(-__builtin_inff());
          put(l, score, column);
        }
        continue;
      }
      for (int v = 0; v < kLanes<T>; v += kWidth<T>) {
        for (uint32_t above = lanes_above<T>(load<V>(scores + v), load<V>(limit + v)); above; above &= above - 1) {
          const int l = v + __builtin_ctz(above);
          put(l, scores[l], column);
        }
      }
    }
  }
};

template <class T>
void run_topk_blocks(const TopkBlocks& args, int64_t begin, int64_t end) {
  using Int = typename Simd<T>::Int;
  const int64_t channels = args.queries.channels, k = args.topk;
  T* scratch = static_cast<T*>(args.scratch);
  T* packs = scratch + kColumns * padded_row(channels);
  T* best = packs + args.group * channels;  // or the limits of lists
  Int* index = reinterpret_cast<Int*>(best + args.group);
  const int64_t pitch = k == 1 ? 1 : kRowPad + k;  // of lists, after their padding
  T* value = reinterpret_cast<T*>(index + args.group * pitch);
  const T* panels = static_cast<const T*>(args.panels);

  for (int64_t first = begin; first < end; first += args.group) {
    const int64_t count = end - first < args.group ? end - first : args.group;
    const int64_t lanes = (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (int64_t s = 0; s < lanes; s += kColumns) {
      T* pack = packs + s / kLanes<T> * kLanes<T> * channels + s % kLanes<T>;
      pack_rows(args.queries, first + s, first + count, scratch, pack, kLanes<T>);
    }
    for (int64_t s = 0; s < lanes; ++s) {
      best[s] = static_cast<T>(-__builtin_inff());
      index[s] = 0;
      if (k == 1) continue;
      T* list = value + s * pitch;
      for (int64_t i = 0; i < kRowPad; ++i) list[i] = static_cast<T>(__builtin_inff());
      for (int64_t i = kRowPad; i < pitch; ++i) list[i] = static_cast<T>(__builtin_nanf(""));
    }
    score_blocks<T>(panels, panels_of(args.num_keys), channels, lanes,
                    [&](int64_t s, const T* some, int64_t num_panels, int64_t column) {
                      const T* pack = packs + s * channels;
                      if (k == 1) {
                        Best<T> epilogue;
                        epilogue.read(best + s, index + s);
                        score_panels(pack, some, num_panels, channels, column, epilogue);
                        epilogue.write(best + s, index + s);
                      } else {
                        const int64_t list = s * pitch + kRowPad;
                        const int64_t filled = count - s < kLanes<T> ? count - s : kLanes<T>;
                        BestK<T> epilogue{best + s, value + list, index + list, k, pitch, filled};
                        score_panels(pack, some, num_panels, channels, column, epilogue);
                      }
                    });
    for (int64_t s = 0; s < count; ++s) {
      const int64_t list = s * pitch + kRowPad;
      if (k > kLongestList) Heap<T>{value + list, index + list}.sort(k);
      const Int* found = k == 1 ? index + s : index + list;
      for (int64_t i = 0; i < k; ++i) args.index[(first + s) * k + i] = static_cast<int32_t>(found[i]);
    }
  }
}

}  // namespace

namespace VIDMEM_ISA {

void mean_blocks(const MeanBlocks& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::float64) {
    run_mean_blocks<double>(args, begin, end);
  } else {
    run_mean_blocks<float>(args, begin, end);
  }
}

void pack_keys(const PackKeys& args, int64_t begin, int64_t end) {
  if (args.keys.dtype == DType::float64) {
    run_pack_keys<double>(args, begin, end);
  } else {
    run_pack_keys<float>(args, begin, end);
  }
}

void topk_blocks(const TopkBlocks& args, int64_t begin, int64_t end) {
  if (args.queries.dtype == DType::float64) {
    run_topk_blocks<double>(args, begin, end);
  } else {
    run_topk_blocks<float>(args, begin, end);
  }
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
