// Gradients of linear attention: numerators, denominators and scores are computed anew, chunk by chunk. In order for
// the queries, which need the state up to them; in reverse for keys and values, which need the gradient of the state.
#include "cpu/linear_chunk.h"

namespace vidmem {
namespace {

template <class T>
struct Backward : Chunk<T> {
  using S = typename Chunk<T>::S;
  using Chunk<T>::a;
  using Chunk<T>::row;
  using Chunk<T>::value_row;
  using Chunk<T>::queries;
  using Chunk<T>::keys;
  using Chunk<T>::values;
  using Chunk<T>::sums;
  using Chunk<T>::seen;
  using Chunk<T>::scores;
  using Chunk<T>::transposed;

  explicit Backward(const LinearAttentionBackward& args) : Chunk<T>(args.forward, args.forward.scratch), b(args) {
    features = static_cast<S*>(a.scratch) + scratch_size(a.size, a.value_size);
    grads = features + kChunkTokens * row;
    transposed_values = grads + kChunkTokens * value_row;
    grad_totals = transposed_values + kChunkTokens * value_row;
    seen_transposed = grad_totals + kChunkTokens;
    running = seen_transposed + row * value_row;
    inverse = static_cast<S*>(b.inverse);
    grad_total = static_cast<S*>(b.grad_total);
  }

  void grad_queries(bool scan, int64_t begin, int64_t end, const S* state, S* grad_state) {
    clear(grad_state, count_of_state());
    if (!scan) {
      turn(state);
      return grad_query_chunks(begin, end, state, grad_state, false);
    }
    clear(running, count_of_state());
    for (int64_t group = begin; group < end; group += a.group) {
      const int64_t stop = smaller(end, group + a.group);
      const bool masked = this->is_masked();
      if (!masked) this->add_group(group, stop, running);
      this->see(state, running);
      turn(seen);
      grad_query_chunks(group, stop, seen, grad_state, masked);
      if (masked) this->add_keys(stop - group, running);
    }
  }

  void grad_keys(bool scan, int64_t begin, int64_t end, const S* grad_state) {
    if (!scan) {
      turn(grad_state);
      return grad_key_chunks(begin, end, grad_state, false);
    }
    clear(running, count_of_state());
    const int64_t groups = (end - begin + a.group - 1) / a.group;
    for (int64_t g = groups - 1; g >= 0; --g) {
      const int64_t group = begin + g * a.group, stop = smaller(end, group + a.group);
      const bool masked = this->is_masked();
      for (int64_t first = group; first < stop && !masked; first += kChunkTokens) {
        const int64_t count = smaller(kChunkTokens, stop - first);
        read_queries_and_grads(first, count);
        add_queries(count, running);
      }
      this->see(grad_state, running);
      turn(seen);
      if (masked) read_queries_and_grads(group, stop - group);
      grad_key_chunks(group, stop, seen, masked);
      if (masked) add_queries(stop - group, running);
    }
  }

 private:
  int64_t count_of_state() const { return state_size(a.size, a.value_size); }

  void turn(const S* state) { transpose(state, value_row, a.size, a.value_size, seen_transposed, row); }

  void grad_query_chunks(int64_t begin, int64_t end, const S* state, S* grad_state, bool masked) {
    for (int64_t first = begin; first < end; first += kChunkTokens) {
      const int64_t count = smaller(kChunkTokens, end - first);
      this->query_state(first, count, state);
      if (masked) {
        this->read_keys(first, count);
        this->query_group(count);
      }
      read_tokens<T>(b.grad_out, first, count, a.value_size, grads, value_row);
      for (int64_t t = 0; t < count; ++t) {
        S factor = 1, grad = 0;
        if (a.normalize) {
          factor = 1 / (this->totals[t] + kEps<S>);
          grad = -dot(grads + t * value_row, sums + t * value_row, a.value_size) * (factor * factor);
        }
        inverse[first + t] = factor;
        grad_total[first + t] = grad;
      }
      scale_grads(first, count);
      add_queries(count, grad_state);
      // The product with the state, its z the column of ones.
      multiply<false>(Left<S>{grads, value_row, 1}, seen_transposed, row, a.value_size, features, row, count, a.size);
      for (int64_t t = 0; t < count; ++t) {
        add_scaled(this->z_of(state), grad_totals[t], features + t * row, row);
      }
      if (masked) grad_query_group(count);
      write_grads(a.q, queries, first, count, static_cast<T*>(b.grad_q) + first * b.grad_q_stride, b.grad_q_stride);
    }
  }

  void grad_query_group(int64_t count) {
    transpose(values, value_row, count, a.value_size, transposed_values, kChunkTokens);
    const int64_t step = this->rows_at_once(keys, count * row);
    for (int64_t i = 0; i < count; i += step) {
      const int64_t rows = smaller(step, count - i), end = this->end_of_block(i + rows - 1, count);
      multiply<false>(Left<S>{grads + i * value_row, value_row, 1}, transposed_values, kChunkTokens, a.value_size,
                      scores, kChunkTokens, rows, end);
      for (int64_t r = 0; r < rows; ++r) {
        S* score = scores + r * kChunkTokens;
        const int64_t seen_end = this->end_of_block(i + r, count);
        for (int64_t j = 0; j < seen_end; ++j) score[j] += grad_totals[i + r];
        clear(score + seen_end, end - seen_end);
      }
      multiply<true>(Left<S>{scores, kChunkTokens, 1}, keys, row, end, features + i * row, row, rows, a.size);
    }
  }

  void grad_key_chunks(int64_t begin, int64_t end, const S* grad_state, bool masked) {
    for (int64_t first = begin; first < end; first += kChunkTokens) {
      const int64_t count = smaller(kChunkTokens, end - first);
      this->read_keys(first, count);
      multiply<false>(Left<S>{values, value_row, 1}, seen_transposed, row, a.value_size, features, row, count, a.size);
      for (int64_t t = 0; t < count; ++t) {
        add_rows(this->z_of(grad_state), features + t * row, features + t * row, row);
      }
      multiply<false>(Left<S>{keys, row, 1}, grad_state, value_row, a.size, sums, value_row, count, a.value_size);
      if (masked) grad_key_group(count);
      write_grads(a.k, keys, first, count, static_cast<T*>(b.grad_k) + first * b.grad_k_stride, b.grad_k_stride);
      T* out = static_cast<T*>(b.grad_v) + first * b.grad_v_stride;
      for (int64_t t = 0; t < count; ++t) write_row(sums + t * value_row, a.value_size, out + t * b.grad_v_stride);
    }
  }

  void grad_key_group(int64_t count) {
    transpose(queries, row, count, a.size, transposed, kChunkTokens);
    transpose(grads, value_row, count, a.value_size, transposed_values, kChunkTokens);
    const int64_t step =
        smaller(this->rows_at_once(queries, count * row), this->rows_at_once(grads, count * value_row));
    for (int64_t j = 0; j < count; j += step) {
      const int64_t rows = smaller(step, count - j);
      const int64_t begin = j / a.block * a.block, depth = count - begin, column = begin / 16 * 16;
      multiply<false>(Left<S>{values + j * value_row, value_row, 1}, transposed_values + column, kChunkTokens,
                      a.value_size, scores + column, kChunkTokens, rows, count - column);
      for (int64_t r = 0; r < rows; ++r) {
        S* score = scores + r * kChunkTokens;
        for (int64_t i = begin; i < count; ++i) score[i] += grad_totals[i];
      }
      clear_unseeing(j, rows, begin);
      multiply<true>(Left<S>{scores + begin, kChunkTokens, 1}, queries + begin * row, row, depth, features + j * row,
                     row, rows, a.size);
      multiply<false>(Left<S>{keys + j * row, row, 1}, transposed + column, kChunkTokens, a.size, scores + column,
                      kChunkTokens, rows, count - column);
      clear_unseeing(j, rows, begin);
      multiply<true>(Left<S>{scores + begin, kChunkTokens, 1}, grads + begin * value_row, value_row, depth,
                     sums + j * value_row, value_row, rows, a.value_size);
    }
  }

  // Scores of the keys from `j` on, for queries of blocks before theirs.
  void clear_unseeing(int64_t j, int64_t rows, int64_t begin) {
    for (int64_t r = 0; r < rows; ++r) {
      clear(scores + r * kChunkTokens + begin, (j + r) / a.block * a.block - begin);
    }
  }

  void read_queries_and_grads(int64_t first, int64_t count) {
    read_features<T>(a.q, a.map, first, count, a.size, queries, row);
    read_tokens<T>(b.grad_out, first, count, a.value_size, grads, value_row);
    scale_grads(first, count);
  }

  // Gradients of outputs to those of numerators.
  void scale_grads(int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      S* grad = grads + t * value_row;
      for (int64_t c = 0; c < value_row; c += Lanes<S>::count) store(load(grad + c) * inverse[first + t], grad + c);
      grad_totals[t] = grad_total[first + t];
    }
  }

  void add_queries(int64_t count, S* state) {
    multiply<true>(Left<S>{queries, 1, row}, grads, value_row, count, state, value_row, a.size, a.value_size);
    S* z = this->z_of(state);
    for (int64_t c = 0; c < row; c += Lanes<S>::count) {
      typename Lanes<S>::type sum{};
      for (int64_t t = 0; t < count; ++t) sum += load(queries + t * row + c) * grad_totals[t];
      store(load(z + c) + sum, z + c);
    }
  }

  static void add_scaled(const S* x, S factor, S* out, int64_t count) {
    for (int64_t c = 0; c < count; c += Lanes<S>::count) store(load(out + c) + load(x + c) * factor, out + c);
  }

  // Through the feature map, whose argument is read again.
  void write_grads(const Tokens& tokens, S* argument, int64_t first, int64_t count, T* out, int64_t stride) {
    if (a.map != FeatureMap::identity) {
      read_tokens<T>(tokens, first, count, a.size, argument, row);
      for (int64_t i = 0; i < count * row; i += Lanes<S>::count) {
        store(load(features + i) * derivative(a.map, load(argument + i)), features + i);
      }
    }
    for (int64_t t = 0; t < count; ++t) write_row(features + t * row, a.size, out + t * stride);
  }

  const LinearAttentionBackward& b;
  S *features, *grads, *transposed_values, *grad_totals, *seen_transposed, *running, *inverse, *grad_total;
};

}  // namespace

namespace VIDMEM_ISA {

void grad_queries(const LinearAttentionBackward& args, bool scan, int64_t begin, int64_t end, const void* state,
                  void* grad_state) {
  dispatch_float(args.forward.dtype, [&](auto tag) {
    using B = Backward<typename decltype(tag)::type>;
    using S = typename B::S;
    B(args).grad_queries(scan, begin, end, static_cast<const S*>(state), static_cast<S*>(grad_state));
  });
}

void grad_keys(const LinearAttentionBackward& args, bool scan, int64_t begin, int64_t end, const void* grad_state) {
  dispatch_float(args.forward.dtype, [&](auto tag) {
    using B = Backward<typename decltype(tag)::type>;
    B(args).grad_keys(scan, begin, end, static_cast<const typename B::S*>(grad_state));
  });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
