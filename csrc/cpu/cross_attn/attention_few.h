// Attention of few queries, for which the packs of attention_tile.h would be mostly empty: every row of keys and values
// is read once, in place, and multiplied by all queries.
//
// For *_kernels.cpp only: everything is internal to one instruction set.
#pragma once

#include "cpu/common/prefetch.h"
#include "cpu/cross_attn/attention_tile.h"

namespace vidmem {
namespace {

constexpr int64_t kFewQueries = 24;  // above about this number, packs are faster
constexpr int kKeyStep = 4;  // keys whose products with a query are summed together; divides kAttentionTile
#if defined(__AVX512F__)
constexpr int kQueryStep = 4;  // queries per load of a row
#else
constexpr int kQueryStep = 2;
#endif

template <int N> struct Queries { static constexpr int count = N; };

// Calls f(first, Queries<n>{}) for steps of queries.
template <class F>
VIDMEM_INLINE void each_queries(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kQueryStep <= count; i += kQueryStep) f(i, Queries<kQueryStep>{});
  for (; i < count; ++i) f(i, Queries<1>{});
}

// scores[query][key] of kQueries queries, whose rows have `channels` elements; E is the storage type of keys.
// Prefetches the rows of `next`, if given: each is on a separate page, which the hardware prefetcher does not predict.
template <class T, int kQueries, class E>
VIDMEM_INLINE void score_keys(const E* const* keys, const E* const* next, int64_t count, const T* queries,
                              int64_t channels, T* scores) {
  using V = Vector<T>;
  for (int64_t j = 0; j < count; j += kKeyStep) {
    V sum[kQueries][kKeyStep] = {};
    if (next) {
      for (int i = 0; i < kKeyStep; ++i) prefetch(next[j + i], channels * sizeof(E));
    }
    int64_t c = 0;
    for (; c + kWidth<T> <= channels; c += kWidth<T>) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeyStep; ++i) {
        const V key = load(keys[j + i] + c);
#pragma GCC unroll 4
        for (int q = 0; q < kQueries; ++q) sum[q][i] += key * load(queries + q * channels + c);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kKeyStep; ++i) {
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        T score = sum_lanes(sum[q][i]);
        for (int64_t d = c; d < channels; ++d) {
          score += queries[q * channels + d] * widen(keys[j + i][d]);
          asm volatile("");  // otherwise GCC multiplies and adds separately: two roundings, the gradient has one
        }
        scores[q * kAttentionTile + j + i] = score;
      }
    }
  }
}

// values[query][channel] = rescale[query] * values + weights[query] times the rows, for kVectors vectors of channels.
template <class T, int kQueries, int kVectors, class E>
VIDMEM_INLINE void add_vectors(const E* const* rows, const E* const* next, int64_t count, int64_t at, const T* weights,
                               const T* rescale, int64_t row, T* values) {
  using V = Vector<T>;
  V sum[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[q][v] = V{};
  }
  for (int64_t j = 0; j < count; ++j) {
    if (next) prefetch(next[j] + at, kVectors * kWidth<T> * sizeof(E));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V value = load(rows[j] + at + v * kWidth<T>);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sum[q][v] += weights[q * kAttentionTile + j] * value;
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = values + q * row + at + v * kWidth<T>;
      store(load(to) * rescale[q] + sum[q][v], to);  // added last: see multiply_tile
    }
  }
}

template <class T, int kQueries, class E>
VIDMEM_INLINE void add_values(const E* const* rows, const E* const* next, int64_t count, const T* weights,
                              const T* rescale, int64_t channels, T* values) {
  const int64_t row = channels;
  int64_t c = 0;
  for (; c + 4 * kWidth<T> <= channels; c += 4 * kWidth<T>) {
    add_vectors<T, kQueries, 4>(rows, next, count, c, weights, rescale, row, values);
  }
  for (; c + kWidth<T> <= channels; c += kWidth<T>) {
    add_vectors<T, kQueries, 1>(rows, next, count, c, weights, rescale, row, values);
  }
  for (; c < channels; ++c) {
    for (int q = 0; q < kQueries; ++q) {
      T sum = 0;
      for (int64_t j = 0; j < count; ++j) sum += weights[q * kAttentionTile + j] * widen(rows[j][c]);
      values[q * row + c] = values[q * row + c] * rescale[q] + sum;
    }
  }
}

VIDMEM_INLINE Doubles in_double(Floats v) { return lower(v) + upper(v); }
VIDMEM_INLINE Doubles in_double(Doubles v) { return v; }

// Converts the scores of one query with the keys of a tile to weights; returns the factor for earlier sums. Weights
// beyond `count`, up to whole vectors, are 0. The total is double, because gradients of so few queries are sensitive to
// a single rounding of lse.
template <class T>
inline T weigh(T* scores, int64_t count, T* largest, double* total) {
  using V = Vector<T>;
  const int64_t whole = round_up(count, kWidth<T>);
  for (int64_t j = count; j < whole; ++j) scores[j] = -kInfinity<T>;
  V most = V{} - kInfinity<T>;
  Doubles sum{};
  for (int64_t j = 0; j < whole; j += kWidth<T>) {
    const V s = load(scores + j);
    most = s > most ? s : most;
  }
  T highest = *largest;
  for (int l = 0; l < kWidth<T>; ++l) highest = most[l] > highest ? most[l] : highest;
  const T base = highest == -kInfinity<T> ? 0 : highest;  // no key is visible yet: every weight is 0
  for (int64_t j = 0; j < whole; j += kWidth<T>) {
    const V weight = exp_of(load(scores + j) - base);
    store(weight, scores + j);
    sum += in_double(weight);
  }
  const T rescale = exp_of(V{} + (*largest - base))[0];
  *largest = highest;
  *total = *total * rescale + sum_lanes(sum);
  return rescale;
}

}  // namespace
}  // namespace vidmem
