#include "cpu/cross_attn/merge_attention_states_kernels.h"

#include <string.h>

#include "cpu/common/convert_rows.h"
#include "cpu/common/lanes.h"
#include "cpu/common/stream_rows.h"

namespace vidmem {
namespace {

inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }

struct Row {
  int64_t batch, row, head;
};

inline Row row_of(int64_t item, int64_t length, int64_t heads) {
  return {item / heads / length, item / heads % length, item % heads};
}

template <class S>
inline S at(const LogSums& sums, const Row& r) {
  return static_cast<const S*>(
      sums.data)[r.batch * sums.batch_stride + r.head * sums.head_stride + r.row * sums.row_stride];
}

template <class T>
inline const T* at(const HeadRows& rows, const Row& r) {
  return static_cast<const T*>(rows.data) + r.batch * rows.batch_stride + r.row * rows.row_stride +
         r.head * rows.head_stride;
}

// Whether a part has a visible key. For a part without one, some libraries return +inf; the part is then ignored.
template <class S>
inline bool counts(S lse) { return __builtin_fabs(lse) != __builtin_inf(); }

// sum (+)= weight * row
template <bool kAdd, class S>
inline void add_row(const S* row, S weight, S* __restrict sum, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) sum[c] = kAdd ? sum[c] + weight * row[c] : weight * row[c];
}

template <class S>
inline S dot(const S* a, const S* b, int64_t channels) {
  constexpr int kWidth = Lanes<S>::count;
  typename Lanes<S>::type sums{};
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) sums += load(a + c) * load(b + c);
  S sum = 0;
  for (; c < channels; ++c) sum += a[c] * b[c];
  for (int i = 0; i < kWidth; ++i) sum += sums[i];
  return sum;
}

template <class T>
void run_merge(const MergeStates& args, int64_t begin, int64_t end, void* scratch) {
  using S = typename Accumulate<T>::type;
  constexpr S infinity = static_cast<S>(__builtin_inff());
  const int64_t channels = args.channels;
  S* const weights = static_cast<S*>(scratch);
  S* const buffer = weights + args.parts;
  S* const sum = buffer + channels;
  T* const narrow = reinterpret_cast<T*>(sum + channels);
  for (int64_t item = begin; item < end; ++item) {
    const Row r = row_of(item, args.length, args.heads);
    S largest = -infinity, total = 0;
    for (int64_t i = 0; i < args.parts; ++i) {
      const S lse = at<S>(args.lses[i], r);
      weights[i] = counts(lse) ? lse : -infinity;
      largest = weights[i] > largest ? weights[i] : largest;
    }
    if (largest == -infinity) largest = 0;  // no key is visible: every weight is 0
    for (int64_t i = 0; i < args.parts; ++i) total += weights[i] = exp_of(weights[i] - largest);  // NaN stays NaN
    const bool empty = total == 0;
    if (empty) total = 1;
    const S lse = static_cast<S>(largest + __builtin_log(static_cast<double>(total)));
    static_cast<S*>(args.lse)[(r.batch * args.heads + r.head) * args.length + r.row] = empty ? -infinity : lse;
    bool any = false;
    for (int64_t i = 0; i < args.parts; ++i) {
      if (!counts(at<S>(args.lses[i], r))) continue;
      const S* const row = as_floats(at<T>(args.outs[i], r), args.outs[i].channel_stride, buffer, channels);
      if (any) {
        add_row<true>(row, weights[i] / total, sum, channels);
      } else {
        add_row<false>(row, weights[i] / total, sum, channels);
      }
      any = true;
    }
    if (!any) zero_row(sum, channels);
    T* const out = static_cast<T*>(args.out) + item * channels;
    if (args.streams) {
      narrow_row(sum, narrow, channels);
      stream_row(narrow, out, channels * sizeof(T));
    } else {
      narrow_row(sum, out, channels);
    }
  }
  if (args.streams) stream_end();
}

template <class T>
void run_merge_backward(const MergeStatesBackward& args, int64_t begin, int64_t end, void* scratch) {
  using S = typename Accumulate<T>::type;
  constexpr S infinity = static_cast<S>(__builtin_inff());
  const int64_t channels = args.channels;
  S* const weights = static_cast<S*>(scratch);
  S* const along = weights + args.parts;
  S* const buffer = along + args.parts;
  S* const grad_buffer = buffer + channels;
  S* const scaled = grad_buffer + channels;
  for (int64_t item = begin; item < end; ++item) {
    const Row r = row_of(item, args.length, args.heads);
    const S lse = at<S>(args.lse, r), base = lse == -infinity ? 0 : lse;
    const S* const grad = as_floats(at<T>(args.grad_out, r), args.grad_out.channel_stride, grad_buffer, channels);
    S shared = 0;
    for (int64_t i = 0; i < args.parts; ++i) {
      T* const grad_row = static_cast<T*>(args.grad_outs) + (i * args.rows + item) * channels;
      if (!counts(at<S>(args.lses[i], r))) {
        zero_row(grad_row, channels);
        continue;
      }
      const S weight = weights[i] = exp_of(at<S>(args.lses[i], r) - base);
      const S* const row = as_floats(at<T>(args.outs[i], r), args.outs[i].channel_stride, buffer, channels);
      along[i] = dot(grad, row, channels);
      shared += weight * along[i];
      add_row<false>(grad, weight, scaled, channels);
      narrow_row(scaled, grad_row, channels);
    }
    if (args.grad_lse.data) shared -= at<S>(args.grad_lse, r);
    const int64_t place = (r.batch * args.heads + r.head) * args.length + r.row;
    for (int64_t i = 0; i < args.parts; ++i) {
      const bool there = counts(at<S>(args.lses[i], r));
      static_cast<S*>(args.grad_lses)[i * args.rows + place] = there ? weights[i] * (along[i] - shared) : 0;
    }
  }
}

}  // namespace

namespace VIDMEM_ISA {

void merge_states(const MergeStates& args, int64_t begin, int64_t end, void* scratch) {
  dispatch_float(args.dtype, [&](auto tag) { run_merge<typename decltype(tag)::type>(args, begin, end, scratch); });
}

void merge_states_backward(const MergeStatesBackward& args, int64_t begin, int64_t end, void* scratch) {
  dispatch_float(args.dtype,
                 [&](auto tag) { run_merge_backward<typename decltype(tag)::type>(args, begin, end, scratch); });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
