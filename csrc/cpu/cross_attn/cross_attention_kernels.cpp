#include "cpu/cross_attn/cross_attention_kernels.h"

#include "cpu/cross_attn/attention_few.h"

namespace vidmem {
namespace {

// Bounds of the windows of the queries of a pack, per lane and for all lanes.
struct PackWindow {
  const int64_t *low, *high;  // kPackRows each
  int64_t lowest, largest_low, smallest_high, highest;

  void set(const AttentionWindow& window, int64_t first, int64_t count, int64_t rows, int64_t* lows, int64_t* highs) {
    low = lows;
    high = highs;
    lowest = smallest_high = INT64_MAX;
    highest = largest_low = INT64_MIN;
    for (int64_t l = 0; l < rows; ++l) {
      const int64_t row = first + (l < count ? l : count - 1);
      const int64_t a = lows[l] = window.low[row], b = highs[l] = window.high[row];
      lowest = a < lowest ? a : lowest;
      largest_low = a > largest_low ? a : largest_low;
      highest = b > highest ? b : highest;
      smallest_high = b < smallest_high ? b : smallest_high;
    }
  }

  Seen seen(const AttentionWindow& window, const int32_t* keys, int64_t count) const {
    bool any = false, all = true;
    for (int64_t j = 0; j < count; ++j) {
      if (keys[j] < window.num_sinks) {
        any = true;
        continue;
      }
      const int64_t t = window.time[keys[j]];
      any |= lowest <= t && t <= highest;
      all &= largest_low <= t && t <= smallest_high;
    }
    return !any ? Seen::none : all ? Seen::all : Seen::some;
  }
};

// Number of keys whose weights are summed in T before they are added to the total in double; gradients need a precise
// lse.
constexpr int64_t kTotalStep = 16;

// Running maximum, sum of weights and weighted values of the queries of a pack.
template <class T>
struct Softmax {
  using V = Vector<T>;
  static constexpr int kRows = kPackRows<T>;
  T* largest;
  double* total;
  T* values;  // values[channel][lane]

  // Converts scores[key][lane] to weights.
  template <bool kMasked>
  VIDMEM_INLINE void add(T* scores, const T* bias, T scale, const AttentionWindow& window, const PackWindow& bounds,
                         const int32_t* keys, int64_t count, int64_t channels) {
    V most[kPackVectors], base[kPackVectors], rescale[kPackVectors];
    for (int v = 0; v < kPackVectors; ++v) most[v] = load(largest + v * kWidth<T>);
    for (int64_t j = 0; j < count; ++j) {
      T* score = scores + j * kRows;
      T keep[kRows];
      if (kMasked) {
        const int64_t t = window.time[keys[j]];
        const bool sink = keys[j] < window.num_sinks;
        for (int l = 0; l < kRows; ++l) keep[l] = sink | ((bounds.low[l] <= t) & (t <= bounds.high[l]));
      }
#pragma GCC unroll 2
      for (int v = 0; v < kPackVectors; ++v) {
        V s = load(score + v * kWidth<T>) * scale;
        if (bias) s += bias[j];
        if (kMasked) s = load(keep + v * kWidth<T>) > V{} ? s : V{} - kInfinity<T>;
        store(s, score + v * kWidth<T>);
        most[v] = s > most[v] ? s : most[v];
      }
    }
    for (int v = 0; v < kPackVectors; ++v) {
      // No key is visible yet: every weight is 0.
      base[v] = most[v] == V{} - kInfinity<T> ? V{} : most[v];
      rescale[v] = exp_of(load(largest + v * kWidth<T>) - base[v]);
      store(most[v], largest + v * kWidth<T>);
      for (int l = 0; l < kWidth<T>; ++l) total[v * kWidth<T> + l] *= rescale[v][l];
    }
    for (int64_t first = 0; first < count; first += kTotalStep) {
      const int64_t end = count - first < kTotalStep ? count : first + kTotalStep;
      V sum[kPackVectors] = {};
      for (int64_t j = first; j < end; ++j) {
#pragma GCC unroll 2
        for (int v = 0; v < kPackVectors; ++v) {
          const V weight = exp_of(load(scores + j * kRows + v * kWidth<T>) - base[v]);
          store(weight, scores + j * kRows + v * kWidth<T>);
          sum[v] += weight;
        }
      }
      for (int v = 0; v < kPackVectors; ++v) {
        for (int l = 0; l < kWidth<T>; ++l) total[v * kWidth<T> + l] += sum[v][l];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 2
      for (int v = 0; v < kPackVectors; ++v) {
        T* value = values + c * kRows + v * kWidth<T>;
        store(load(value) * rescale[v], value);
      }
    }
  }
};

// Adds to the values of a pack what drop_special removed from the rows of a tile, for visible pairs.
template <class T>
void add_special(const AttendQueries& args, const int32_t* keys, int64_t count, const T* weights,
                 const PackWindow& bounds, Seen seen, T* values, T* buffer) {
  constexpr int kRows = kPackRows<T>;
  for (int64_t j = 0; j < count; ++j) {
    const T* row = row_of(args.v, keys[j], buffer);
    const int64_t t = args.window.time[keys[j]];
    const bool all = seen == Seen::all || keys[j] < args.window.num_sinks;
    for (int64_t c = 0; c < args.v.channels; ++c) {
      if (!is_special(row[c])) continue;
      for (int l = 0; l < kRows; ++l) {
        if (all || (bounds.low[l] <= t && t <= bounds.high[l])) values[c * kRows + l] += weights[j * kRows + l] * row[c];
      }
    }
  }
}

// Writes the results of query number `row` from its sums.
template <class T>
VIDMEM_INLINE void finish(const AttendQueries& args, int64_t row, const T* values, int64_t step, T largest,
                          double total, T* buffer) {
  const int64_t channels = args.v.channels;
  const bool empty = total == 0;
  const double sum = empty ? 1 : total;
  const T divisor = static_cast<T>(sum);
  for (int64_t c = 0; c < channels; ++c) buffer[c] = values[c * step] / divisor;
  write_row(buffer, args.out_dtype, args.out, row * args.out_stride, channels);
  static_cast<T*>(args.lse)[row] =
      empty ? -kInfinity<T> : static_cast<T>(largest + __builtin_log(sum));
}

// Rows of a tile in place, or widened into `copies` if their channels are strided. The last row is repeated to fill the
// list.
template <class T, class E>
VIDMEM_INLINE void list_rows(const AttentionRows& rows, const int32_t* index, int64_t count, T* copies,
                             const E** list) {
  for (int64_t j = 0; j < count; ++j) {
    if constexpr (std::is_same_v<T, E>) {
      const T* row = row_of(rows, index[j], copies + j * rows.channels);
      list[j] = row;
    } else {
      list[j] = static_cast<const E*>(rows.data) + index[j] * rows.row_stride;
    }
  }
  for (int64_t j = count; j < kAttentionTile; ++j) list[j] = list[count - 1];
}

// Replaces rows of values of a tile that hold NaN or infinities by copies with zeros instead.
template <class E>
bool list_without_special(const E** list, int64_t count, int64_t channels, E* copies) {
  bool found = false;
  for (int64_t j = 0; j < count; ++j) {
    bool special = false;
    for (int64_t c = 0; c < channels; ++c) special |= is_special(widen(list[j][c]));
    if (!special) continue;
    E* copy = copies + j * channels;
    for (int64_t c = 0; c < channels; ++c) copy[c] = is_special(widen(list[j][c])) ? E{} : list[j][c];
    list[j] = copy;
    found = true;
  }
  return found;
}

// Returns false if a result is NaN or infinite while a window hides keys: a hidden key may have caused it, so the call
// is repeated with `careful`, which excludes hidden keys.
template <class T, class E>
bool attend_few_queries(const AttendQueries& args, bool careful) {
  const int64_t channels = args.q.channels, value_channels = args.v.channels, count = args.count;
  Arena arena{static_cast<char*>(args.scratch)};
  T* buffer = arena.take<T>(channels > value_channels ? channels : value_channels);
  T* queries = arena.take<T>(count * channels);
  T* values = arena.take<T>(count * value_channels);
  T* key_copies = arena.take<T>(kAttentionTile * channels);
  T* value_copies = arena.take<T>(kAttentionTile * value_channels);
  T* scores = arena.take<T>(kFewQueries * kAttentionTile);
  E* clean_values = reinterpret_cast<E*>(arena.take<T>(kAttentionTile * value_channels));
  T largest[kFewQueries], rescale[kFewQueries];
  double total[kFewQueries];
  const E *lists[2][kAttentionTile], *rows[kAttentionTile];  // keys of a tile and of the next one; values of the tile
  const T scale = static_cast<T>(args.scale);

  for (int64_t i = 0; i < count; ++i) {
    const T* row = row_of(args.q, args.first + i, buffer);
    for (int64_t c = 0; c < channels; ++c) queries[i * channels + c] = row[c];
    largest[i] = -kInfinity<T>;
    total[i] = 0;
  }
  for (int64_t i = 0; i < count * value_channels; ++i) values[i] = 0;

  const auto tile = [&](int64_t start) {
    return args.num_keys - start < kAttentionTile ? args.num_keys - start : kAttentionTile;
  };
  if (args.num_keys > 0) list_rows<T, E>(args.k, args.keys, tile(0), key_copies, lists[0]);
  for (int64_t start = 0; start < args.num_keys; start += kAttentionTile) {
    const int64_t some = tile(start), end = start + some;
    const int32_t* index = args.keys + start;
    const E** keys = lists[start / kAttentionTile % 2];
    const E** next = lists[1 - start / kAttentionTile % 2];
    list_rows<T, E>(args.v, index, some, value_copies, rows);
    const bool special = careful && list_without_special<E>(rows, some, value_channels, clean_values);
    each_queries(count, [&](int64_t i, auto step) {
      score_keys<T, decltype(step)::count>(keys, i == 0 ? rows : nullptr, some, queries + i * channels, channels,
                                           scores + i * kAttentionTile);
    });
    for (int64_t i = 0; i < count; ++i) {
      T* score = scores + i * kAttentionTile;
      for (int64_t j = 0; !args.bias && j < some; ++j) score[j] *= scale;
      for (int64_t j = 0; args.bias && j < some; ++j) {  // one rounding, as in the gradient
        score[j] = score[j] * scale + static_cast<const T*>(args.bias)[index[j]];
      }
      const int64_t low = args.window.low ? args.window.low[args.first + i] : 0;
      const int64_t high = args.window.low ? args.window.high[args.first + i] : 0;
      for (int64_t j = 0; args.window.low && j < some; ++j) {
        const int64_t t = args.window.time[index[j]];
        if (!(index[j] < args.window.num_sinks || (low <= t && t <= high))) score[j] = -kInfinity<T>;
      }
      rescale[i] = weigh(score, some, largest + i, total + i);
    }
    if (end < args.num_keys) list_rows<T, E>(args.k, args.keys + end, tile(end), key_copies, next);
    each_queries(count, [&](int64_t i, auto step) {
      const E* const* fetch = i == 0 && end < args.num_keys ? next : nullptr;
      add_values<T, decltype(step)::count>(rows, fetch, some, scores + i * kAttentionTile, rescale + i, value_channels,
                                           values + i * value_channels);
    });
    for (int64_t j = 0; special && j < some; ++j) {
      const T* row = row_of(args.v, index[j], buffer);
      for (int64_t c = 0; c < value_channels; ++c) {
        if (!is_special(row[c])) continue;
        for (int64_t i = 0; i < count; ++i) {
          if (args.window.sees(args.first + i, index[j])) values[i * value_channels + c] += scores[i * kAttentionTile + j] * row[c];
        }
      }
    }
  }
  if (args.window.low && !careful && any_special(values, count * value_channels)) return false;
  for (int64_t i = 0; i < count; ++i) {
    finish(args, args.first + i, values + i * value_channels, 1, largest[i], total[i], buffer);
  }
  return true;
}

template <class T, class E>
void attend_few_queries(const AttendQueries& args) {
  if (!attend_few_queries<T, E>(args, false)) attend_few_queries<T, E>(args, true);
}

template <class T>
void run_attend_queries(const AttendQueries& args) {
  constexpr int kRows = kPackRows<T>;
  const int64_t channels = args.q.channels, value_channels = args.v.channels;
  const int64_t value_row = round_up(value_channels, kPanel);
  const int64_t packs = (args.count + kRows - 1) / kRows;
  Arena arena{static_cast<char*>(args.scratch)};
  T* buffer = arena.take<T>(channels > value_row ? channels : value_row);
  T* queries = arena.take<T>(packs * kRows * channels);
  T* values = arena.take<T>(packs * kRows * value_row);
  T* largest = arena.take<T>(packs * kRows);
  double* total = arena.take<double>(packs * kRows);
  T* key_panels = arena.take<T>(kAttentionTile * channels);
  T* value_panels = arena.take<T>(kAttentionTile * value_row);
  T* scores = arena.take<T>(kAttentionTile * kRows);
  T* bias = arena.take<T>(kAttentionTile);
  int64_t* lows = arena.take<int64_t>(packs * kRows);
  int64_t* highs = arena.take<int64_t>(packs * kRows);

  for (int64_t p = 0; p < packs; ++p) {
    int32_t rows[kRows];
    const int64_t first = args.first + p * kRows, left = args.first + args.count - first;
    const int64_t some = left < kRows ? left : kRows;
    for (int64_t l = 0; l < some; ++l) rows[l] = static_cast<int32_t>(first + l);
    pack_transposed(args.q, rows, some, kRows, buffer, queries + p * kRows * channels);
  }
  for (int64_t i = 0; i < packs * kRows * value_row; ++i) values[i] = 0;
  for (int64_t i = 0; i < packs * kRows; ++i) {
    largest[i] = -kInfinity<T>;
    total[i] = 0;
  }

  for (int64_t start = 0; start < args.num_keys; start += kAttentionTile) {
    const int64_t count = args.num_keys - start < kAttentionTile ? args.num_keys - start : kAttentionTile;
    const int32_t* keys = args.keys + start;
    pack_transposed(args.k, keys, count, kPanel, buffer, key_panels);
    pack_panels(args.v, keys, count, buffer, value_panels);
    if (args.bias) {
      for (int64_t j = 0; j < count; ++j) bias[j] = static_cast<const T*>(args.bias)[keys[j]];
    }
    bool scanned = false, special = false;
    for (int64_t p = 0; p < packs; ++p) {
      PackWindow bounds{};
      Seen seen = Seen::all;
      if (args.window.low) {
        const int64_t first = args.first + p * kRows, left = args.first + args.count - first;
        bounds.set(args.window, first, left < kRows ? left : kRows, kRows, lows + p * kRows, highs + p * kRows);
        seen = bounds.seen(args.window, keys, count);
        if (seen == Seen::none) continue;
        if (seen == Seen::some && !scanned) {
          special = drop_special(value_panels, count * value_row);
          scanned = true;
        }
      }
      multiply_panels<T, false>(key_panels, count, queries + p * kRows * channels, channels, scores);
      Softmax<T> softmax{largest + p * kRows, total + p * kRows, values + p * kRows * value_row};
      const T* biases = args.bias ? bias : nullptr;
      const T scale = static_cast<T>(args.scale);
      if (seen == Seen::all) {
        softmax.template add<false>(scores, biases, scale, args.window, bounds, keys, count, value_channels);
      } else {
        softmax.template add<true>(scores, biases, scale, args.window, bounds, keys, count, value_channels);
      }
      multiply_panels<T, true>(value_panels, value_channels, scores, count, values + p * kRows * value_row);
      if (special) add_special(args, keys, count, scores, bounds, seen, values + p * kRows * value_row, buffer);
    }
  }

  for (int64_t i = 0; i < args.count; ++i) {
    const T* value = values + i / kRows * kRows * value_row + i % kRows;
    finish(args, args.first + i, value, kRows, largest[i], total[i], buffer);
  }
}

}  // namespace

namespace VIDMEM_ISA {

void attend_queries(const AttendQueries& args) {
  const bool wide = args.q.dtype == DType::float64;
  if (args.count > kFewQueries) return wide ? run_attend_queries<double>(args) : run_attend_queries<float>(args);
  if (wide) return attend_few_queries<double, double>(args);
  const bool as_stored = args.k.dtype == args.q.dtype && args.v.dtype == args.q.dtype;
  const bool together = as_stored && args.k.channel_stride == 1 && args.v.channel_stride == 1;
  switch (together ? args.q.dtype : DType::float32) {
    case DType::bfloat16: return attend_few_queries<float, bf16>(args);
    case DType::float16: return attend_few_queries<float, fp16>(args);
    default: return attend_few_queries<float, float>(args);
  }
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
