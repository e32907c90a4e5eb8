// Linear attention: tokens are widened chunk by chunk into tiles, where the feature map is applied, and all products
// are taken of tiles.
#include "cpu/linear_attention_kernels.h"

#include "cpu/feature_map.h"
#include "cpu/matmul_tile.h"

namespace vidmem {
namespace {

template <class S> constexpr S kEps = static_cast<S>(1e-10);  // as in the reference

// Tokens of a group see the state before it and, up to the end of their block, one another; else the state after it.
bool is_masked(const LinearAttention& args) { return args.group > args.block; }

template <class T>
class Attention {
 public:
  using S = typename Accumulate<T>::type;

  explicit Attention(const LinearAttention& args) : a(args) {
    queries = static_cast<S*>(a.scratch);
    keys = queries + kChunkTokens * row;
    transposed = keys + kChunkTokens * row;
    values = transposed + kChunkTokens * row;
    sums = values + kChunkTokens * value_row;
    scores = sums + kChunkTokens * value_row;
    totals = scores + 8 * kChunkTokens;
    seen = totals + kChunkTokens;
  }

  void sum_state(int64_t begin, int64_t end, S* state) {
    clear(state, state_size(a.size, a.value_size));
    for (int64_t group = begin; group < end; group += a.group) add_group(group, smaller(end, group + a.group), state);
  }

  void read_state(int64_t begin, int64_t end, const S* state) {
    for (int64_t first = begin; first < end; first += kChunkTokens) {
      const int64_t count = smaller(kChunkTokens, end - first);
      query_state(first, count, state);
      write(first, count);
    }
  }

  void scan(int64_t begin, int64_t end, const S* before, S* state) {
    clear(state, state_size(a.size, a.value_size));
    const bool masked = is_masked(a);
    for (int64_t group = begin; group < end; group += a.group) {
      const int64_t stop = smaller(end, group + a.group);
      if (masked) {
        scan_group(group, stop - group, before, state);
      } else {
        add_group(group, stop, state);
        see(before, state);
        read_state(group, stop, seen);
      }
    }
  }

 private:
  void see(const S* before, const S* state) { add_rows(before, state, seen, state_size(a.size, a.value_size)); }

  void read_keys(int64_t first, int64_t count) {
    read_features<T>(a.k, a.map, first, count, a.size, keys, row);
    read_tokens<T>(a.v, first, count, a.value_size, values, value_row);
  }

  void add_keys(int64_t count, S* state) {
    multiply<true>(Left<S>{keys, 1, row}, values, value_row, count, state, value_row, a.size, a.value_size);
    add_column_sums(keys, row, count, row, state + a.size * value_row);
  }

  void add_group(int64_t begin, int64_t end, S* state) {
    for (int64_t first = begin; first < end; first += kChunkTokens) {
      const int64_t count = smaller(kChunkTokens, end - first);
      read_keys(first, count);
      add_keys(count, state);
    }
  }

  // Numerators and denominators of a chunk from the state alone.
  void query_state(int64_t first, int64_t count, const S* state) {
    read_features<T>(a.q, a.map, first, count, a.size, queries, row);
    multiply<false>(Left<S>{queries, row, 1}, state, value_row, a.size, sums, value_row, count, a.value_size);
    const S* z = state + a.size * value_row;
    for (int64_t t = 0; t < count && a.normalize; ++t) totals[t] = dot(queries + t * row, z, row);
  }

  void scan_group(int64_t first, int64_t count, const S* before, S* state) {
    see(before, state);
    query_state(first, count, seen);
    read_keys(first, count);
    transpose(keys, row, count, a.size, transposed, kChunkTokens);
    // A product of 0 and a value that is not seen must not matter, so one token at a time where it could.
    const int64_t step = all_finite(values, count * value_row) ? kTileRows : 1;
    for (int64_t i = 0; i < count; i += step) add_visible(i, smaller(step, count - i), count);
    write(first, count);
    add_keys(count, state);
  }

  // The first token of a group that its token `i` does not see.
  int64_t end_of_block(int64_t i, int64_t count) const { return smaller(count, (i / a.block + 1) * a.block); }

  void add_visible(int64_t i, int64_t rows, int64_t count) {
    const int64_t end = end_of_block(i + rows - 1, count);
    multiply<false>(Left<S>{queries + i * row, row, 1}, transposed, kChunkTokens, a.size, scores, kChunkTokens, rows,
                    end);
    for (int64_t r = 0; r < rows; ++r) {
      S* score = scores + r * kChunkTokens;
      clear(score + end_of_block(i + r, count), padded(end) - end_of_block(i + r, count));
      if (a.normalize) totals[i + r] += sum_row(score, end);
    }
    multiply<true>(Left<S>{scores, kChunkTokens, 1}, values, value_row, end, sums + i * value_row, value_row, rows,
                   a.value_size);
  }

  void write(int64_t first, int64_t count) {
    T* out = static_cast<T*>(a.out) + first * a.out_stride;
    for (int64_t t = 0; t < count; ++t) {
      S* sum = sums + t * value_row;
      if (a.normalize) {
        const S total = totals[t] + kEps<S>;
        for (int64_t c = 0; c < value_row; c += Lanes<S>::count) store(load(sum + c) / total, sum + c);
      }
      write_row(sum, a.value_size, out + t * a.out_stride);
    }
  }

  const LinearAttention& a;
  const int64_t row = padded(a.size), value_row = padded(a.value_size);
  S *queries, *keys, *transposed, *values, *sums, *scores, *totals, *seen;
};

}  // namespace

namespace VIDMEM_ISA {

void sum_state(const LinearAttention& args, int64_t begin, int64_t end, void* state) {
  dispatch_float(args.dtype, [&](auto tag) {
    using A = Attention<typename decltype(tag)::type>;
    A(args).sum_state(begin, end, static_cast<typename A::S*>(state));
  });
}

void read_state(const LinearAttention& args, int64_t begin, int64_t end, const void* state) {
  dispatch_float(args.dtype, [&](auto tag) {
    using A = Attention<typename decltype(tag)::type>;
    A(args).read_state(begin, end, static_cast<const typename A::S*>(state));
  });
}

void scan_tokens(const LinearAttention& args, int64_t begin, int64_t end, const void* before, void* state) {
  dispatch_float(args.dtype, [&](auto tag) {
    using A = Attention<typename decltype(tag)::type>;
    A(args).scan(begin, end, static_cast<const typename A::S*>(before), static_cast<typename A::S*>(state));
  });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
