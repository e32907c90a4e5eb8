// Gradients of linear attention: denominators and scores are recomputed chunk by chunk, in order for the queries, which
// need the state up to them; in reverse for keys and values, which need the gradient of the state.
#include "cpu/linear_attn/linear_chunk.h"

namespace vidmem {
namespace {

template <class T>
struct Backward : Chunk<T> {
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
    features = a.scratch + scratch_size(a.size, a.value_size);
    grads = features + kChunkTokens * row;
    transposed_values = grads + kChunkTokens * value_row;
    grad_totals = transposed_values + kChunkTokens * value_row;
    seen_transposed = grad_totals + kChunkTokens;
    running = seen_transposed + row * value_row;
    totals_of_tokens = b.total;
    grad_total = b.grad_total;
  }

  void grad_queries(bool scan, int64_t begin, int64_t end, const float* state, float* grad_state) {
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
      if (masked) this->add_keys(stop, stop - group, running);
    }
  }

  void grad_keys(bool scan, int64_t begin, int64_t end, const float* grad_state) {
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

  void turn(const float* state) {
    transpose(state, value_row, a.size, a.value_size, seen_transposed, row);
    for (int64_t e = 0; e < a.value_size; ++e) clear(seen_transposed + e * row + a.size, row - a.size);
  }

  void grad_query_chunks(int64_t begin, int64_t end, const float* state, float* grad_state, bool masked) {
    for (int64_t first = begin; first < end; first += kChunkTokens) {
      const int64_t count = smaller(kChunkTokens, end - first);
      read_features<T>(a.q, a.map, first, count, a.size, queries, row);
      read_tokens<T>(b.grad_out, first, count, a.value_size, grads, value_row);
      multiply<false>(Left{grads, value_row, 1}, seen_transposed, row, a.value_size, features, row, count, a.size);
      if (masked) {
        this->read_keys(first, count);
        grad_query_group(count);
      }
      normalize_query_grads(first, count, this->z_of(state), masked);
      scale_grads(first, count);
      add_queries(count, grad_state);
      write_grads(a.q, queries, first, count, static_cast<T*>(b.grad_q) + first * b.grad_q_stride, b.grad_q_stride);
    }
  }

  // From the gradient t of a query without normalisation: with s the scale, d its denominator and z the sum of the keys
  // that it sees, s (t - s (q t) / d z) / d. The numerator is not needed, so its error does not enter the difference.
  void normalize_query_grads(int64_t first, int64_t count, const float* z, bool masked) {
    float* visible = sums;  // not used otherwise here
    for (int64_t c = 0; c < row; c += kFloats) store(load(z + c), visible + c);
    const double scale = a.scale;
    int64_t end = 0;
    for (int64_t t = 0; t < count; ++t) {
      for (; masked && end < this->end_of_block(t, count); ++end) add_rows(visible, keys + end * row, visible, row);
      float* grad = features + t * row;
      double total = 1, ratio = 0;  // with few channels, the difference may cancel almost completely
      if (a.normalize) {
        total = wide_dot(queries + t * row, visible, row) * scale + kEps;
        ratio = wide_dot(queries + t * row, grad, a.size) * scale / total;
      }
      for (int64_t c = 0; c < a.size; ++c) grad[c] = static_cast<float>((grad[c] - ratio * visible[c]) * scale / total);
      totals_of_tokens[first + t] = static_cast<float>(total);
      grad_total[first + t] = static_cast<float>(-ratio * scale / total);
    }
  }

  void grad_query_group(int64_t count) {
    transpose(values, value_row, count, a.value_size, transposed_values, kChunkTokens);
    const int64_t step = this->rows_at_once(keys, count * row);
    for (int64_t i = 0; i < count; i += step) {
      const int64_t rows = smaller(step, count - i), end = this->end_of_block(i + rows - 1, count);
      multiply<false>(Left{grads + i * value_row, value_row, 1}, transposed_values, kChunkTokens, a.value_size,
                      scores, kChunkTokens, rows, end);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t seen_end = this->end_of_block(i + r, count);
        clear(scores + r * kChunkTokens + seen_end, end - seen_end);
      }
      multiply<true>(Left{scores, kChunkTokens, 1}, keys, row, end, features + i * row, row, rows, a.size);
    }
  }

  void grad_key_chunks(int64_t begin, int64_t end, const float* grad_state, bool masked) {
    for (int64_t first = begin; first < end; first += kChunkTokens) {
      const int64_t count = smaller(kChunkTokens, end - first);
      this->read_keys(first, count);
      multiply<false>(Left{values, value_row, 1}, seen_transposed, row, a.value_size, features, row, count, a.size);
      for (int64_t t = 0; t < count; ++t) {
        add_rows(this->z_of(grad_state), features + t * row, features + t * row, row);
      }
      multiply<false>(Left{keys, row, 1}, grad_state, value_row, a.size, sums, value_row, count, a.value_size);
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
      multiply<false>(Left{values + j * value_row, value_row, 1}, transposed_values + column, kChunkTokens,
                      a.value_size, scores + column, kChunkTokens, rows, count - column);
      for (int64_t r = 0; r < rows; ++r) {
        float* score = scores + r * kChunkTokens;
        for (int64_t i = begin; i < count; ++i) score[i] += grad_totals[i];
      }
      clear_unseeing(j, rows, begin);
      multiply<true>(Left{scores + begin, kChunkTokens, 1}, queries + begin * row, row, depth, features + j * row,
                     row, rows, a.size);
      multiply<false>(Left{keys + j * row, row, 1}, transposed + column, kChunkTokens, a.size, scores + column,
                      kChunkTokens, rows, count - column);
      clear_unseeing(j, rows, begin);
      multiply<true>(Left{scores + begin, kChunkTokens, 1}, grads + begin * value_row, value_row, depth,
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

  // Converts gradients of outputs to gradients of numerators.
  void scale_grads(int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      float* grad = grads + t * value_row;
      for (int64_t c = 0; c < value_row; c += kFloats) store(load(grad + c) * a.scale / totals_of_tokens[first + t], grad + c);
      grad_totals[t] = grad_total[first + t];
    }
  }

  void add_queries(int64_t count, float* state) {
    multiply<true>(Left{queries, 1, row}, grads, value_row, count, state, value_row, a.size, a.value_size);
    float* z = this->z_of(state);
    for (int64_t c = 0; c < row; c += kFloats) {
      Floats sum{};
      for (int64_t t = 0; t < count; ++t) sum += load(queries + t * row + c) * grad_totals[t];
      store(load(z + c) + sum, z + c);
    }
  }

  // Applies the derivative of the feature map, whose argument is read again.
  void write_grads(const Tokens& tokens, float* argument, int64_t first, int64_t count, T* out, int64_t stride) {
    if (a.map != FeatureMap::identity) {
      read_tokens<T>(tokens, first, count, a.size, argument, row);
      for (int64_t i = 0; i < count * row; i += kFloats) {
        store(load(features + i) * derivative(a.map, load(argument + i)), features + i);
      }
    }
    for (int64_t t = 0; t < count; ++t) write_row(features + t * row, a.size, out + t * stride);
  }

  const LinearAttentionBackward& b;
  float *features, *grads, *transposed_values, *grad_totals, *seen_transposed, *running, *totals_of_tokens, *grad_total;
};

}  // namespace

namespace VIDMEM_ISA {

void grad_queries(const LinearAttentionBackward& args, bool scan, int64_t begin, int64_t end, const float* state,
                  float* grad_state) {
  dispatch_tokens(args.forward.dtype, [&](auto tag) {
    using B = Backward<typename decltype(tag)::type>;
    B(args).grad_queries(scan, begin, end, state, grad_state);
  });
}

void grad_keys(const LinearAttentionBackward& args, bool scan, int64_t begin, int64_t end, const float* grad_state) {
  dispatch_tokens(args.forward.dtype, [&](auto tag) {
    using B = Backward<typename decltype(tag)::type>;
    B(args).grad_keys(scan, begin, end, grad_state);
  });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
