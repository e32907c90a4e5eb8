// Each key is a lane, and all products of a tile of pairs are computed at once. The gradients of the keys and values of
// a group stay in the cache while its queries are processed; those of the queries are summed in memory.
#include "cpu/cross_attn/cross_attention_backward_kernels.h"

#include "cpu/cross_attn/attention_tile.h"

namespace vidmem {
namespace {

template <class T>
void run_query_terms(const QueryTerms& args, int64_t begin, int64_t end) {
  T* const buffer = static_cast<T*>(args.scratch);
  const int64_t channels = args.out.channels;
  for (int64_t i = begin; i < end; ++i) {
    const T* out = row_of(args.out, i, buffer);
    const T* grad = row_of(args.grad, i, buffer + channels);
    double sums[8] = {}, shared = 0;
    int64_t c = 0;
    for (; c + 8 <= channels; c += 8) {
      for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(grad[c + j]) * out[c + j];
    }
    for (; c < channels; ++c) shared += static_cast<double>(grad[c]) * out[c];
    for (int j = 0; j < 8; ++j) shared += sums[j];
    if (args.grad_lse) shared -= static_cast<const T*>(args.grad_lse)[i * args.grad_lse_stride];
    static_cast<T*>(args.shared)[i] = static_cast<T>(shared);
    const T lse = static_cast<const T*>(args.lse)[i * args.lse_stride];
    static_cast<T*>(args.base)[i] = lse == -kInfinity<T> ? 0 : lse;
  }
}

template <class T>
void run_sum_queries(const SumQueries& args, int64_t begin, int64_t end) {
  T* const row = static_cast<T*>(args.scratch);
  for (int64_t i = begin; i < end; ++i) {
    const T* part = static_cast<const T*>(args.parts) + i * args.channels;
    for (int64_t c = 0; c < args.channels; ++c) row[c] = part[c];
    for (int64_t p = 1; p < args.count; ++p) {
      part += args.part_stride;
      for (int64_t c = 0; c < args.channels; ++c) row[c] += part[c];
    }
    for (int64_t c = 0; c < args.channels; ++c) row[c] *= static_cast<T>(args.scale);
    write_row(row, args.dtype, args.grad_q, i * args.grad_q_stride, args.channels);
  }
}

// Number of queries whose bias gradients are summed in T before they are added to a sum in double.
constexpr int64_t kBiasStep = 8;

// The keys of one pack.
template <class T>
struct KeyPack {
  using V = Vector<T>;
  static constexpr int kRows = kPackRows<T>;
  const T* bias;  // -inf in lanes without a key, or with a key that no query sees
  double* grad_bias;
  const int64_t* time;  // null: the window hides no key
  int64_t earliest, latest;

  void set_times(const AttentionWindow& window, int64_t first, int64_t count, int64_t* times) {
    time = times;
    earliest = INT64_MAX;
    latest = INT64_MIN;
    for (int64_t l = 0; l < kRows; ++l) {
      const int64_t t = times[l] = window.time[first + (l < count ? l : count - 1)];
      earliest = t < earliest ? t : earliest;
      latest = t > latest ? t : latest;
    }
  }

  bool hides() const {
    bool any = time;
    for (int l = 0; l < kRows; ++l) any |= bias[l] == -kInfinity<T>;
    return any;
  }

  bool sees(const AttentionWindow& window, int32_t query, int lane) const {
    const bool there = bias[lane] != -kInfinity<T>;
    return there && (!time || (window.low[query] <= time[lane] && time[lane] <= window.high[query]));
  }

  Seen seen(const AttentionWindow& window, const int32_t* queries, int64_t count) const {
    bool any = false, all = true;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t low = window.low[queries[j]], high = window.high[queries[j]];
      any |= low <= latest && earliest <= high;
      all &= low <= earliest && latest <= high;
    }
    return !any ? Seen::none : all ? Seen::all : Seen::some;
  }

  // Converts weights[query][key] from products of queries and keys to weights, and grads[query][key] from products of
  // gradients and values to gradients of scores.
  template <bool kMasked>
  VIDMEM_INLINE void differentiate(const AttendKeys& args, const int32_t* queries, int64_t count, T* weights,
                                   T* grads) {
    const T scale = static_cast<T>(args.scale);
    V sum[kPackVectors], biases[kPackVectors];
    T keep[kRows];
    for (int v = 0; v < kPackVectors; ++v) {
      sum[v] = V{};
      biases[v] = load(bias + v * kWidth<T>);
    }
    const auto add_up = [&] {
      for (int v = 0; v < kPackVectors; ++v) {
        for (int l = 0; l < kWidth<T>; ++l) grad_bias[v * kWidth<T> + l] += sum[v][l];
        sum[v] = V{};
      }
    };
    for (int l = 0; kMasked && l < kRows; ++l) keep[l] = bias[l] != -kInfinity<T>;
    for (int64_t j = 0; j < count; ++j) {
      const T base = static_cast<const T*>(args.base)[queries[j]];
      const T shared = static_cast<const T*>(args.shared)[queries[j]];
      if (kMasked && time) {
        const int64_t low = args.window.low[queries[j]], high = args.window.high[queries[j]];
        for (int l = 0; l < kRows; ++l) {
          keep[l] = (low <= time[l]) & (time[l] <= high) & (bias[l] != -kInfinity<T>);
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kPackVectors; ++v) {
        T* const weight_at = weights + j * kRows + v * kWidth<T>;
        T* const grad_at = grads + j * kRows + v * kWidth<T>;
        const V score = load(weight_at) * scale + biases[v];
        V weight = exp_of(score - base);
        V grad = weight * (load(grad_at) - shared);
        if (kMasked) {
          const auto seen = load(keep + v * kWidth<T>) > V{};
          weight = seen ? weight : V{};
          grad = seen ? grad : V{};
        }
        store(weight, weight_at);
        store(grad, grad_at);
        sum[v] += grad;
      }
      if (args.bias && j % kBiasStep == kBiasStep - 1) add_up();
    }
    if (args.bias) add_up();
  }
};

// grad_q[query][channel] += sum over the keys of a pack of grads[query][key] * keys[key][channel].
template <class T>
void add_to_queries(const T* grads, int64_t count, const T* keys, int64_t key_row, T* grad_q) {
  constexpr int kRows = kPackRows<T>;
  for (int64_t c = 0; c < key_row; c += kRows) {
    for (int64_t j = 0; j < count; j += kPanel) {
      multiply_tile<T, true>(grads + j * kRows, 1, kRows, keys + c, key_row, kRows, grad_q + j * key_row + c, key_row);
    }
  }
}

// Adds to the gradients of keys or values, out[channel][lane], the values that drop_special removed from the rows of a
// tile of queries, for visible pairs; `panels` still has them.
template <class T>
void add_special_queries(const T* panels, int64_t count, int64_t channels, const T* factors, const KeyPack<T>& pack,
                         const AttentionWindow& window, const int32_t* queries, T* out) {
  constexpr int kRows = kPackRows<T>;
  for (int64_t j = 0; j < count; ++j) {
    const T* row = panels + j / kPanel * kPanel * channels + j % kPanel;
    for (int64_t c = 0; c < channels; ++c) {
      if (!is_special(row[c * kPanel])) continue;
      for (int l = 0; l < kRows; ++l) {
        if (pack.sees(window, queries[j], l)) out[c * kRows + l] += factors[j * kRows + l] * row[c * kPanel];
      }
    }
  }
}

// The same for the gradients of queries, out[query][channel], and the keys of a pack.
template <class T>
void add_special_keys(const T* keys, int64_t channels, const T* factors, const KeyPack<T>& pack,
                      const AttentionWindow& window, const int32_t* queries, int64_t count, T* out, int64_t out_row) {
  constexpr int kRows = kPackRows<T>;
  for (int64_t c = 0; c < channels; ++c) {
    for (int l = 0; l < kRows; ++l) {
      const T key = keys[c * kRows + l];
      if (!is_special(key)) continue;
      for (int64_t j = 0; j < count; ++j) {
        if (pack.sees(window, queries[j], l)) out[j * out_row + c] += factors[j * kRows + l] * key;
      }
    }
  }
}

// Writes values[channel][lane], times factor, to the row of each key.
template <class T>
void write_transposed(const T* values, int64_t channels, T factor, int64_t first, int64_t count, DType dtype, void* out,
                      int64_t stride, T* buffer) {
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t c = 0; c < channels; ++c) buffer[c] = values[c * kPackRows<T> + l] * factor;
    write_row(buffer, dtype, out, (first + l) * stride, channels);
  }
}

template <class T>
void run_attend_keys(const AttendKeys& args) {
  constexpr int kRows = kPackRows<T>;
  const int64_t channels = args.k.channels, value_channels = args.v.channels;
  const int64_t key_row = round_up(channels, kRows), panel_row = round_up(channels, kPanel);
  const int64_t value_row = round_up(value_channels, kPanel);
  const int64_t packs = (args.count + kRows - 1) / kRows;
  Arena arena{static_cast<char*>(args.scratch)};
  T* buffer = arena.take<T>(channels > value_channels ? channels : value_channels);
  T* key_packs = arena.take<T>(packs * kRows * channels);
  T* value_packs = arena.take<T>(packs * kRows * value_channels);
  T* key_rows = arena.take<T>(packs * kRows * key_row);
  T* grad_k = arena.take<T>(packs * kRows * panel_row);
  T* grad_v = arena.take<T>(packs * kRows * value_row);
  T* bias = arena.take<T>(packs * kRows);
  double* grad_bias = arena.take<double>(packs * kRows);
  int64_t* times = arena.take<int64_t>(packs * kRows);
  T* query_panels = arena.take<T>(kAttentionTile * channels);
  T* grad_panels = arena.take<T>(kAttentionTile * value_channels);
  T* query_columns = arena.take<T>(kAttentionTile * panel_row);
  T* grad_columns = arena.take<T>(kAttentionTile * value_row);
  T* grad_q = arena.take<T>(kAttentionTile * key_row);
  T* weights = arena.take<T>(kAttentionTile * kRows);
  T* grads = arena.take<T>(kAttentionTile * kRows);

  for (int64_t p = 0; p < packs; ++p) {
    int32_t rows[kRows];
    const int64_t first = args.first + p * kRows, left = args.count - p * kRows;
    const int64_t some = left < kRows ? left : kRows;
    for (int64_t l = 0; l < some; ++l) rows[l] = static_cast<int32_t>(first + l);
    pack_transposed(args.k, rows, some, kRows, buffer, key_packs + p * kRows * channels);
    pack_transposed(args.v, rows, some, kRows, buffer, value_packs + p * kRows * value_channels);
    for (int64_t l = 0; l < kRows; ++l) {
      T* to = key_rows + (p * kRows + l) * key_row;
      const T own = args.bias && l < some ? static_cast<const T*>(args.bias)[rows[l]] : 0;
      bias[p * kRows + l] = l < some ? own : -kInfinity<T>;
      const T* row = bias[p * kRows + l] == -kInfinity<T> ? nullptr : row_of(args.k, rows[l], buffer);
      for (int64_t c = 0; c < key_row; ++c) to[c] = row && c < channels ? row[c] : 0;
      grad_bias[p * kRows + l] = 0;
    }
  }
  const bool special_keys = args.window.low && drop_special(key_rows, packs * kRows * key_row);
  for (int64_t i = 0; i < packs * kRows * panel_row; ++i) grad_k[i] = 0;
  for (int64_t i = 0; i < packs * kRows * value_row; ++i) grad_v[i] = 0;

  for (int64_t start = 0; start < args.num_queries; start += kAttentionTile) {
    const int64_t count = args.num_queries - start < kAttentionTile ? args.num_queries - start : kAttentionTile;
    const int32_t* queries = args.queries + start;
    pack_transposed(args.q, queries, count, kPanel, buffer, query_panels);
    pack_transposed(args.grad, queries, count, kPanel, buffer, grad_panels);
    pack_panels(args.q, queries, count, buffer, query_columns);
    pack_panels(args.grad, queries, count, buffer, grad_columns);
    for (int64_t i = 0; i < kAttentionTile * key_row; ++i) grad_q[i] = 0;
    bool scanned = false, special_queries = false, special_grads = false;
    for (int64_t p = 0; p < packs; ++p) {
      const int64_t left = args.count - p * kRows;
      KeyPack<T> pack{bias + p * kRows, grad_bias + p * kRows, nullptr, 0, 0};
      Seen seen = Seen::all;
      if (args.window.low) {
        pack.set_times(args.window, args.first + p * kRows, left < kRows ? left : kRows, times + p * kRows);
        seen = pack.seen(args.window, queries, count);
        if (seen == Seen::none) continue;
        if (seen == Seen::all) pack.time = nullptr;
        if (seen == Seen::some && !scanned) {
          special_queries = drop_special(query_columns, count * panel_row);
          special_grads = drop_special(grad_columns, count * value_row);
          scanned = true;
        }
      }
      multiply_panels<T, false>(query_panels, count, key_packs + p * kRows * channels, channels, weights);
      multiply_panels<T, false>(grad_panels, count, value_packs + p * kRows * value_channels, value_channels, grads);
      if (pack.hides()) {
        pack.template differentiate<true>(args, queries, count, weights, grads);
      } else {
        pack.template differentiate<false>(args, queries, count, weights, grads);
      }
      T *pack_k = grad_k + p * kRows * panel_row, *pack_v = grad_v + p * kRows * value_row;
      multiply_panels<T, true>(grad_columns, value_channels, weights, count, pack_v);
      multiply_panels<T, true>(query_columns, channels, grads, count, pack_k);
      add_to_queries(grads, count, key_rows + p * kRows * key_row, key_row, grad_q);
      if (special_grads) {
        add_special_queries(grad_panels, count, value_channels, weights, pack, args.window, queries, pack_v);
      }
      if (special_queries) {
        add_special_queries(query_panels, count, channels, grads, pack, args.window, queries, pack_k);
      }
      if (special_keys) {
        add_special_keys(key_packs + p * kRows * channels, channels, grads, pack, args.window, queries, count, grad_q,
                         key_row);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      T* to = static_cast<T*>(args.grad_q) + queries[j] * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] += grad_q[j * key_row + c];
    }
  }

  for (int64_t p = 0; p < packs; ++p) {
    const int64_t first = args.first + p * kRows, left = args.count - p * kRows, some = left < kRows ? left : kRows;
    for (int64_t l = 0; l < some; ++l) {  // 0 times NaN was added for a key that no query sees
      if (bias[p * kRows + l] != -kInfinity<T>) continue;
      for (int64_t c = 0; c < channels; ++c) grad_k[p * kRows * panel_row + c * kRows + l] = 0;
      for (int64_t c = 0; c < value_channels; ++c) grad_v[p * kRows * value_row + c * kRows + l] = 0;
    }
    write_transposed(grad_k + p * kRows * panel_row, channels, static_cast<T>(args.scale), first, some, args.k.dtype,
                     args.grad_k, args.grad_k_stride, buffer);
    write_transposed(grad_v + p * kRows * value_row, value_channels, T(1), first, some, args.k.dtype, args.grad_v,
                     args.grad_v_stride, buffer);
    for (int64_t l = 0; l < some; ++l) {
      static_cast<T*>(args.grad_bias)[first + l] = static_cast<T>(grad_bias[p * kRows + l]);
    }
  }
}

}  // namespace

namespace VIDMEM_ISA {

void query_terms(const QueryTerms& args, int64_t begin, int64_t end) {
  if (args.out.dtype == DType::float64) {
    run_query_terms<double>(args, begin, end);
  } else {
    run_query_terms<float>(args, begin, end);
  }
}

void attend_keys(const AttendKeys& args) {
  if (args.k.dtype == DType::float64) {
    run_attend_keys<double>(args);
  } else {
    run_attend_keys<float>(args);
  }
}

void sum_queries(const SumQueries& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::float64) {
    run_sum_queries<double>(args, begin, end);
  } else {
    run_sum_queries<float>(args, begin, end);
  }
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
