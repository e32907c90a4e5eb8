// Products are rounded before they are added (the build forbids fusing), as in the reference: results are its own to
// the bit for every instruction set, but for dot products, whose order of summation goes with the width of a vector.
#include "cpu/token_merge_kernels.h"

#include "cpu/convert_rows.h"
#include "cpu/lanes.h"
#include "cpu/prefetch.h"
#include "cpu/stream_rows.h"

namespace vidmem {
namespace {

constexpr int kBatch = 4;             // rows that are added in one pass, their sum in registers
constexpr int64_t kPiece = 512;       // channels of what is staged, so that it stays in the L1 cache
constexpr int64_t kDotPiece = 2048;   // channels summed up before they join the rest
constexpr int kDotVectors = 2;        // of a dot product in flight

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- groups ---

template <class Index>
struct Group {
  const Index* order;
  int64_t stride, count;
  int64_t after;  // tokens that follow the group in `order`

  int64_t operator[](int64_t k) const { return order[k * stride]; }
};

// The tokens of a row, after a check that they are what the rest of the plan says. All rows passing makes `order` a
// permutation: ascending and equally assigned, no token can occur twice, and there are as many as tokens.
template <class Index>
inline bool find_group(const Groups& g, int64_t batch, int64_t row, Group<Index>& group) {
  const Index* offsets = static_cast<const Index*>(g.offsets.data) + batch * g.offsets.batch_stride;
  const int64_t first = offsets[row * g.offsets.stride], last = offsets[(row + 1) * g.offsets.stride];
  if (first < 0 || last < first || last > g.tokens) return false;
  if ((row == 0 && first != 0) || (row == g.rows - 1 && last != g.tokens)) return false;
  const Index* order = static_cast<const Index*>(g.order.data) + batch * g.order.batch_stride;
  group = {order + first * g.order.stride, g.order.stride, last - first, g.tokens - last};
  const Index* assignment = static_cast<const Index*>(g.assignment.data) + batch * g.assignment.batch_stride;
  int64_t before = -1;
  for (int64_t k = 0; k < group.count; ++k) {
    const int64_t token = group[k];
    if (token <= before || token >= g.tokens || assignment[token * g.assignment.stride] != row) return false;
    before = token;
  }
  return true;
}

// Calls work(batch, row, group) for the rows [begin, end) of the flattened (B, M); false once a group is not one.
template <class Index, class Work>
inline bool for_groups(const Groups& g, int64_t begin, int64_t end, const Work& work) {
  int64_t batch = g.rows ? begin / g.rows : 0, row = begin - batch * g.rows;
  for (int64_t i = begin; i < end; ++i) {
    Group<Index> group;
    if (!find_group(g, batch, row, group)) return false;
    work(batch, row, group);
    if (++row == g.rows) {
      row = 0;
      ++batch;
    }
  }
  return true;
}

// Size of a token and of groups of them; 1 per token where no sizes are given.
template <class S>
struct Sizes {
  const S* data;
  int64_t stride;

  Sizes(const Weights& w, int64_t batch)
      : data(w.data ? static_cast<const S*>(w.data) + batch * w.batch_stride : nullptr), stride(w.stride) {}

  S operator[](int64_t token) const { return data ? data[token * stride] : S(1); }

  template <class Index>
  S total(const Group<Index>& group) const {
    if (!data) return static_cast<S>(group.count);
    S sum = 0;
    for (int64_t k = 0; k < group.count; ++k) sum += data[group[k] * stride];
    return sum;
  }

  S share(int64_t token, S total) const { return total == 0 ? S(0) : (*this)[token] / total; }
};

// --- rows ---

// The processor foresees no jump to another row: this much of one that comes later is asked for.
constexpr int64_t kAheadBytes = 2048;

template <class T>
inline void prefetch_row(const T* in, int64_t channels) {
  prefetch(in, smaller(kAheadBytes, channels * sizeof(T)));
}

// out = start + rows[0] * weight[0] + rows[1] * weight[1] ..., from left to right; start may be null.
template <int K, bool kWeighted, class T, class S, class Out>
inline void add_rows(const T* const* in, const S* weights, const S* start, Out* out, int64_t channels) {
  using Vector = typename Lanes<S>::type;
  constexpr int lanes = Lanes<S>::count;
  const T* rows[K];
  S weight[K];
  for (int k = 0; k < K; ++k) {
    rows[k] = in[k];
    weight[k] = kWeighted ? weights[k] : S(1);
  }
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    Vector sum = start ? load(start + c) : Vector{};
    for (int k = 0; k < K; ++k) sum += kWeighted ? load(rows[k] + c) * weight[k] : load(rows[k] + c);
    store(sum, out + c);
  }
  for (; c < channels; ++c) {
    S sum = start ? start[c] : S(0);
    for (int k = 0; k < K; ++k) sum += kWeighted ? widen(rows[k][c]) * weight[k] : widen(rows[k][c]);
    narrow(sum, out[c]);
  }
}

template <bool kWeighted, class T, class S, class Out>
inline void add_rows(int count, const T* const* in, const S* weights, const S* start, Out* out, int64_t channels) {
  switch (count) {
    case 1: return add_rows<1, kWeighted>(in, weights, start, out, channels);
    case 2: return add_rows<2, kWeighted>(in, weights, start, out, channels);
    case 3: return add_rows<3, kWeighted>(in, weights, start, out, channels);
    default: return add_rows<kBatch, kWeighted>(in, weights, start, out, channels);
  }
}

template <bool kWeighted, class T, class Index>
bool merge(const MergeRows& args, int64_t begin, int64_t end) {
  using S = typename Accumulate<T>::type;
  const Rows& x = args.x;
  const int64_t channels = args.channels;
  return for_groups<Index>(args.groups, begin, end, [&](int64_t batch, int64_t row, const Group<Index>& group) {
    const T* src = static_cast<const T*>(x.data) + batch * x.batch_stride;
    const int64_t at = batch * args.groups.rows + row;
    T* out = static_cast<T*>(args.out) + at * channels;
    const Sizes<S> size(args.size, batch);
    const S total = kWeighted ? size.total(group) : S(0);
    if (kWeighted) static_cast<S*>(args.total)[at] = total;
    if (group.count == 0) {
      zero_row(out, channels);
      return;
    }
    if (group.count == 1 && (!kWeighted || size.share(group[0], total) == 1)) {
      copy_row(src + group[0] * x.row_stride, x.channel_stride, out, channels);
      return;
    }
    const bool staged = x.channel_stride != 1;
    if (!staged) {  // the next groups' tokens, as in unmerge
      const int64_t ahead = smaller(smaller(group.count, kBatch), group.after);
      for (int64_t k = 0; k < ahead; ++k) {
        const int64_t token = group[group.count + k];
        if (token >= 0 && token < args.groups.tokens) prefetch_row(src + token * x.row_stride, channels);
      }
    }
    const int64_t piece = staged || group.count > kBatch ? kPiece : channels;
    S sums[kPiece];
    T stage[kBatch][kPiece];
    for (int64_t first = 0; first < channels; first += piece) {
      const int64_t width = smaller(piece, channels - first);
      for (int64_t k = 0; k < group.count; k += kBatch) {
        const int count = static_cast<int>(smaller(kBatch, group.count - k));
        const T* rows[kBatch];
        S weights[kBatch];
        for (int j = 0; j < count; ++j) {
          const int64_t token = group[k + j];
          rows[j] = src + token * x.row_stride + first * x.channel_stride;
          if (kWeighted) weights[j] = size.share(token, total);
          if (staged) {
            copy_row(rows[j], x.channel_stride, stage[j], width);
            rows[j] = stage[j];
          }
        }
        const S* start = k ? sums : nullptr;
        if (k + kBatch < group.count) {
          add_rows<kWeighted>(count, rows, weights, start, sums, width);
        } else {
          add_rows<kWeighted>(count, rows, weights, start, out + first, width);
        }
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

// The same, and returns <grad, x>; summed in double, since the gradient of size is what large terms of it leave.
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
      for (int64_t k = 0; k < group.count; ++k) of_total += along[group[k]] * (size.share(group[k], total) / total);
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

// By token: writing in order beats reading every row only once by group, 7.2 ms to 9.2 for 16,384 x 1,536 float32 in
// memory on huge pages. Streamed: 8,192 x 512 took 0.69 ms, and 0.79 with stores through the caches.
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
    if (args.groups.wide) {
      valid = args.weighted ? merge<true, T, int64_t>(args, begin, end) : merge<false, T, int64_t>(args, begin, end);
    } else {
      valid = args.weighted ? merge<true, T, int32_t>(args, begin, end) : merge<false, T, int32_t>(args, begin, end);
    }
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
