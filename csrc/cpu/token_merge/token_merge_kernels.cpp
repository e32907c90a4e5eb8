// Products are rounded before they are added (the build forbids fusing), as in the reference: results equal the
// reference's bit by bit for every instruction set, except dot products, whose order of summation depends on the vector
// width.
#include "cpu/token_merge/token_merge_kernels.h"

#include "cpu/common/stream_rows.h"
#include "cpu/token_merge/merge_mean.h"

namespace vidmem {
namespace {

constexpr int64_t kPiece = 512;       // channels staged at a time, so that they stay in the L1 cache
constexpr int64_t kDotPiece = 2048;   // channels summed before they are added to the total
constexpr int kDotVectors = 2;        // vectors of a dot product in flight

// --- rows ---

// out = start + rows[0] + rows[1] ..., from left to right; start may be null.
template <int K, class T, class S, class Out>
inline void add_rows(const T* const* in, const S* start, Out* out, int64_t channels) {
  using Vector = typename Lanes<S>::type;
  constexpr int lanes = Lanes<S>::count;
  const T* rows[K];
  for (int k = 0; k < K; ++k) rows[k] = in[k];
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    Vector sum = start ? load(start + c) : Vector{};
    for (int k = 0; k < K; ++k) sum += load(rows[k] + c);
    store(sum, out + c);
  }
  for (; c < channels; ++c) {
    S sum = start ? start[c] : S(0);
    for (int k = 0; k < K; ++k) sum += widen(rows[k][c]);
    narrow(sum, out[c]);
  }
}

template <class T, class S, class Out>
inline void add_rows(int count, const T* const* in, const S* start, Out* out, int64_t channels) {
  switch (count) {
    case 1: return add_rows<1>(in, start, out, channels);
    case 2: return add_rows<2>(in, start, out, channels);
    case 3: return add_rows<3>(in, start, out, channels);
    default: return add_rows<kBatch>(in, start, out, channels);
  }
}

// Calls run(std::true_type or std::false_type).
template <class Run>
inline auto with_flag(bool flag, const Run& run) {
  return flag ? run(std::true_type{}) : run(std::false_type{});
}

// Processes the tokens of a group, for all kinds of sums of rows. Rows whose channel stride is not 1 are copied to
// `stage` in pieces.
template <class T>
inline const T* piece_of(const T* row, int64_t channel_stride, int64_t first, int64_t width, T* stage) {
  row += first * channel_stride;
  if (channel_stride == 1) return row;
  copy_row(row, channel_stride, stage, width);
  return stage;
}

// Prefetches the tokens of the next groups, as in unmerge.
template <class T, class Index>
inline void prefetch_next(const MergeRows& args, const T* src, const Group<Index>& group) {
  if (args.x.channel_stride != 1) return;
  const int64_t ahead = smaller(smaller(group.count, kBatch), group.after);
  for (int64_t k = 0; k < ahead; ++k) {
    const int64_t token = group[group.count + k];
    if (token >= 0 && token < args.groups.tokens) prefetch_row(src + token * args.x.row_stride, args.channels);
  }
}

template <class T, class Index>
bool sum(const MergeRows& args, int64_t begin, int64_t end) {
  using S = typename Accumulate<T>::type;
  const Rows& x = args.x;
  const int64_t channels = args.channels;
  return for_groups<Index>(args.groups, begin, end, [&](int64_t batch, int64_t row, const Group<Index>& group) {
    const T* src = static_cast<const T*>(x.data) + batch * x.batch_stride;
    T* out = static_cast<T*>(args.out) + (batch * args.groups.rows + row) * channels;
    if (group.count == 0) {
      zero_row(out, channels);
      return;
    }
    if (group.count == 1) {
      copy_row(src + group[0] * x.row_stride, x.channel_stride, out, channels);
      return;
    }
    prefetch_next(args, src, group);
    const int64_t piece = x.channel_stride != 1 || group.count > kBatch ? kPiece : channels;
    S sums[kPiece];
    T stage[kBatch][kPiece];
    for (int64_t first = 0; first < channels; first += piece) {
      const int64_t width = smaller(piece, channels - first);
      for (int64_t k = 0; k < group.count; k += kBatch) {
        const int count = static_cast<int>(smaller(kBatch, group.count - k));
        const T* rows[kBatch];
        for (int j = 0; j < count; ++j) {
          rows[j] = piece_of(src + group[k + j] * x.row_stride, x.channel_stride, first, width, stage[j]);
        }
        const S* start = k ? sums : nullptr;
        if (k + kBatch < group.count) {
          add_rows(count, rows, start, sums, width);
        } else {
          add_rows(count, rows, start, out + first, width);
        }
      }
    }
  });
}

template <bool kSized, class T, class Index>
bool merge(const MergeRows& args, int64_t begin, int64_t end) {
  using S = typename Accumulate<T>::type;
  const Rows& x = args.x;
  const int64_t channels = args.channels;
  return for_groups<Index>(args.groups, begin, end, [&](int64_t batch, int64_t row, const Group<Index>& group) {
    const T* src = static_cast<const T*>(x.data) + batch * x.batch_stride;
    const int64_t at = batch * args.groups.rows + row;
    T* out = static_cast<T*>(args.out) + at * channels;
    const Sizes<S> size(args.size, batch);
    const S total = size.total(group);
    static_cast<S*>(args.total)[at] = total;
    if (group.count == 0 || total == 0) {
      zero_row(out, channels);
      return;
    }
    // The first token of the largest size, and the number of other tokens that count.
    int64_t origin = 0, others = group.count - 1;
    S own = size[group[0]];
    if (kSized) {
      others -= own == 0;
      for (int64_t k = 1; k < group.count; ++k) {
        const S weight = size[group[k]];
        const bool is_larger = weight > own;  // no branch, which would be mispredicted half of the time
        own = is_larger ? weight : own;
        origin = is_larger ? k : origin;
        others -= weight == 0;
      }
    }
    const int64_t origin_token = group[origin];
    const bool is_finite = own - own == 0;
    if (others == 0 && (is_finite || (group.count == 1 && own > 0))) {
      copy_row(src + origin_token * x.row_stride, x.channel_stride, out, channels);
      return;
    }
    prefetch_next(args, src, group);
    const bool staged = x.channel_stride != 1;
    const int64_t piece = staged || others > kBatch ? kPiece : channels;
    const S up = kSized ? scale_up(total) : S(1);
    const Divisor<S> by(total * up);
    S sums[kPiece];
    T stage[kBatch + 1][kPiece];
    for (int64_t first = 0; first < channels; first += piece) {
      const int64_t width = smaller(piece, channels - first);
      const T* from = piece_of(src + origin_token * x.row_stride, x.channel_stride, first, width, stage[kBatch]);
      bool all_finite = is_finite;
      int64_t k = 0;
      for (int64_t done = 0; done < others && all_finite;) {
        int count = 0;
        const T* rows[kBatch] = {};
        S weights[kBatch] = {};
        for (; k < group.count && count < kBatch; ++k) {
          const S weight = size[group[k]];
          rows[count] = piece_of(src + group[k] * x.row_stride, x.channel_stride, first, width, stage[count]);
          weights[count] = weight * up;
          count += (k != origin) & (weight != 0);
        }
        const S* start = done ? sums : nullptr;
        done += count;
        if (done < others) {
          add_deviations<kSized, false, false>(count, from, rows, weights, start, by, sums, width);
        } else {
          all_finite = with_flag(by.is_power, [&](auto power) {
            return add_deviations<kSized, true, decltype(power)::value>(count, from, rows, weights, start, by,
                                                                         out + first, width);
          });
        }
      }
      for (int64_t c = first; !all_finite && c < first + width; ++c) {
        narrow(mean_at<S>(src + c * x.channel_stride, x.row_stride, group, size, origin_token, total), out[c]);
      }
    }
  });
}

// --- gradient ---

// out = grad * share
template <class T, class S>
inline void scale_row(const T* grad, S share, T* out, int64_t channels) {
  constexpr int lanes = Lanes<S>::count;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) store(load(grad + c) * share, out + c);
  for (; c < channels; ++c) narrow(widen(grad[c]) * share, out[c]);
}

// The same, and returns <grad, x>, summed in double because large terms cancel in the gradient of size.
template <class T>
inline float scale_and_dot(const T* grad, const T* x, float share, T* out, int64_t channels) {
  Doubles sums[2 * kDotVectors] = {};
  double sum = 0;
  int64_t c = 0;
  for (; c + kDotVectors * kFloats <= channels; c += kDotVectors * kFloats) {
    for (int v = 0; v < kDotVectors; ++v) {
      const Floats g = load(grad + c + v * kFloats), own = load(x + c + v * kFloats);
      sums[2 * v] += lower(g) * lower(own);
      sums[2 * v + 1] += upper(g) * upper(own);
      store(g * share, out + c + v * kFloats);
    }
  }
  for (; c < channels; ++c) {
    sum += double(widen(grad[c])) * double(widen(x[c]));
    narrow(widen(grad[c]) * share, out[c]);
  }
  for (const Doubles& part : sums) {
    for (int i = 0; i < kDoubles; ++i) sum += part[i];
  }
  return static_cast<float>(sum);
}

template <class T, class Index>
bool backward(const MergeBackward& args, int64_t begin, int64_t end) {
  using S = typename Accumulate<T>::type;
  const int64_t channels = args.channels, tokens = args.groups.tokens;
  return for_groups<Index>(args.groups, begin, end, [&](int64_t batch, int64_t row, const Group<Index>& group) {
    const Rows &grad = args.grad, &x = args.x;
    const T* grad_row = static_cast<const T*>(grad.data) + batch * grad.batch_stride + row * grad.row_stride;
    const bool dots = args.wants_size && !args.has_dots;
    const T* src = dots ? static_cast<const T*>(x.data) + batch * x.batch_stride : nullptr;
    T* grad_x = static_cast<T*>(args.grad_x) + batch * tokens * channels;
    S* along = static_cast<S*>(args.grad_size) + batch * tokens;
    const Sizes<S> size(args.size, batch);
    const S total = size.total(group);
    if (dots) {
      for (int64_t k = 0; k < group.count; ++k) along[group[k]] = 0;
    }
    const bool stage_grad = grad.channel_stride != 1, stage_x = dots && x.channel_stride != 1;
    const int64_t piece = stage_grad || stage_x ? kPiece : kDotPiece;
    T stage[2][kPiece];
    for (int64_t first = 0; first < channels; first += piece) {
      const int64_t width = smaller(piece, channels - first);
      const T* g = grad_row + first * grad.channel_stride;
      if (stage_grad) {
        copy_row(g, grad.channel_stride, stage[0], width);
        g = stage[0];
      }
      for (int64_t k = 0; k < group.count; ++k) {
        const int64_t token = group[k];
        const T* own = dots ? src + token * x.row_stride + first * x.channel_stride : nullptr;
        if (stage_x) {
          copy_row(own, x.channel_stride, stage[1], width);
          own = stage[1];
        }
        T* out = grad_x + token * channels + first;
        const S share = size.share(token, total);
        if constexpr (sizeof(S) == sizeof(float)) {
          if (dots) {
            along[token] += scale_and_dot(g, own, share, out, width);
            continue;
          }
        }
        scale_row(g, share, out, width);
      }
    }
    if (!args.wants_size) return;
    // <grad, x> is the gradient of a share, size / total: by the size, and by the total of its group.
    const S* grad_total = static_cast<const S*>(args.grad_total.data) + batch * args.grad_total.batch_stride;
    S of_total = 0;
    if (total != 0) {
      for (int64_t k = 0; k < group.count; ++k) {
        const S share = size.share(group[k], total);
        if (share != 0) of_total += along[group[k]] * (share / total);  // a NaN of size 0 does not affect other tokens
      }
    }
    of_total = grad_total[row * args.grad_total.stride] - of_total;
    for (int64_t k = 0; k < group.count; ++k) {
      S& slope = along[group[k]];
      slope = (total == 0 ? S(0) : slope / total) + of_total;
    }
  });
}

template <class Index>
bool multiply(const MergeBackward& args, int64_t batch, int64_t first, int64_t begin, int64_t end, double* out) {
  const Groups& g = args.groups;
  const Index* assignment = static_cast<const Index*>(g.assignment.data) + batch * g.assignment.batch_stride;
  const double* grad = static_cast<const double*>(args.grad.data) + batch * args.grad.batch_stride;
  const double* x = static_cast<const double*>(args.x.data) + batch * args.x.batch_stride;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = assignment[token * g.assignment.stride];
    if (row < 0 || row >= g.rows) return false;
    const double *from = grad + row * args.grad.row_stride, *own = x + token * args.x.row_stride;
    double* to = out + (token - first) * args.channels;
    for (int64_t c = 0; c < args.channels; ++c) {
      to[c] = from[c * args.grad.channel_stride] * own[c * args.x.channel_stride];
    }
  }
  return true;
}

// --- unmerging ---

// By token: writing in order is faster than reading every row only once by group, 7.2 ms versus 9.2 ms for
// 16,384 x 1,536 float32 on huge pages. With streaming stores 8,192 x 512 took 0.69 ms, through the caches 0.79 ms.
template <class T, class Index>
bool unmerge(const UnmergeRows& args, int64_t begin, int64_t end) {
  const Groups& g = args.groups;
  int64_t batch = g.tokens ? begin / g.tokens : 0, token = begin - batch * g.tokens;
  T* out = static_cast<T*>(args.out) + begin * args.channels;
  const int64_t row_bytes = args.channels * sizeof(T);
  const bool streams = args.y.channel_stride == 1 && g.batch * g.tokens * row_bytes >= kStreamBytes;
  for (int64_t i = begin; i < end; ++i) {
    const Index* assignment = static_cast<const Index*>(g.assignment.data) + batch * g.assignment.batch_stride;
    const T* y = static_cast<const T*>(args.y.data) + batch * args.y.batch_stride;
    const int64_t row = assignment[token * g.assignment.stride];
    if (row < 0 || row >= g.rows) return false;
    if (token + 2 < g.tokens && args.y.channel_stride == 1) {
      const int64_t next = assignment[(token + 2) * g.assignment.stride];
      if (next >= 0 && next < g.rows) prefetch_row(y + next * args.y.row_stride, args.channels);
    }
    if (streams) {
      stream_row(y + row * args.y.row_stride, out, row_bytes);
    } else {
      copy_row(y + row * args.y.row_stride, args.y.channel_stride, out, args.channels);
    }
    out += args.channels;
    if (++token == g.tokens) {
      token = 0;
      ++batch;
    }
  }
  if (streams) stream_end();
  return true;
}

}  // namespace

namespace VIDMEM_ISA {

bool merge_rows(const MergeRows& args, int64_t begin, int64_t end) {
  bool valid = false;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_flag(args.groups.wide, [&](auto wide) {
      using Index = std::conditional_t<decltype(wide)::value, int64_t, int32_t>;
      if (!args.is_mean) {
        valid = sum<T, Index>(args, begin, end);
      } else if (args.size.data) {
        valid = merge<true, T, Index>(args, begin, end);
      } else {
        valid = merge<false, T, Index>(args, begin, end);
      }
    });
  });
  return valid;
}

bool merge_backward(const MergeBackward& args, int64_t begin, int64_t end) {
  bool valid = false;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    valid = args.groups.wide ? backward<T, int64_t>(args, begin, end) : backward<T, int32_t>(args, begin, end);
  });
  return valid;
}

bool multiply_rows(const MergeBackward& args, int64_t batch, int64_t first, int64_t begin, int64_t end, double* out) {
  return args.groups.wide ? multiply<int64_t>(args, batch, first, begin, end, out)
                          : multiply<int32_t>(args, batch, first, begin, end, out);
}

bool unmerge_rows(const UnmergeRows& args, int64_t begin, int64_t end) {
  const bool wide = args.groups.wide;
  switch (args.element_size) {
    case 2: return wide ? unmerge<uint16_t, int64_t>(args, begin, end) : unmerge<uint16_t, int32_t>(args, begin, end);
    case 4: return wide ? unmerge<uint32_t, int64_t>(args, begin, end) : unmerge<uint32_t, int32_t>(args, begin, end);
    default: return wide ? unmerge<uint64_t, int64_t>(args, begin, end) : unmerge<uint64_t, int32_t>(args, begin, end);
  }
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
