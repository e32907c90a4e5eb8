// Code shared by linear attention and its gradient on the CPU side: checks, pieces of a sequence, states.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "common/tensor.h"
#include "cpu/common/aligned_buffer.h"
#include "cpu/common/grain.h"
#include "cpu/linear_attn/linear_attention_kernels.h"

namespace vidmem {

constexpr int64_t kPieceTokens = 2048;  // a state per piece is small compared with its tokens

inline FeatureMap feature_map_of(const char* op, const std::string& name) {
  if (name == "relu") return FeatureMap::relu;
  if (name == "elu1") return FeatureMap::elu1;
  VIDMEM_CHECK(name == "identity", op, "feature_map must be one of relu, elu1, identity, got '", name, "'");
  return FeatureMap::identity;
}

struct Piece {
  int64_t begin, end;
  int64_t first, last;  // pieces of its block; with is_scan, the piece itself
};

struct Plan {
  bool is_scan;  // a piece has many groups; else a block has many pieces
  int64_t group;
  std::vector<Piece> pieces;
};

// Number of tokens to process; 0 without channels, because an expanded tensor may then have any length.
inline int64_t tokens_to_walk(const Tensor& q, const Tensor& v) {
  return q.size(0) * q.size(2) == 0 || q.size(3) + v.size(3) == 0 ? 0 : q.size(1);
}

inline Plan make_plan(int64_t tokens, int64_t block) {
  Plan plan{};
  plan.is_scan = block <= kPieceTokens / 2 && block < tokens;
  if (plan.is_scan) {
    plan.group = block <= kChunkTokens / 2 ? kChunkTokens / block * block : block;
    const int64_t length = kPieceTokens / plan.group * plan.group;
    for (int64_t begin = 0; begin < tokens; begin += length) {
      const int64_t piece = plan.pieces.size();
      plan.pieces.push_back({begin, std::min(tokens, begin + length), piece, piece});
    }
    return plan;
  }
  plan.group = block;
  for (int64_t start = 0; start < tokens; start += block) {
    const int64_t stop = std::min(tokens, start + block);
    const int64_t piece = plan.pieces.size(), last = piece + (stop - start - 1) / kPieceTokens;
    for (int64_t begin = start; begin < stop; begin += kPieceTokens) {
      plan.pieces.push_back({begin, std::min(stop, begin + kPieceTokens), piece, last});
    }
  }
  return plan;
}

// Calls f(sequence, number of the piece, piece, scratch of the given floats) for all pieces. Every thread processes a
// range of tokens for all heads, because the heads of a token share pages.
template <class F>
void for_pieces(const Plan& plan, int64_t sequences, int64_t cost, int64_t scratch, const F& f) {
  const int64_t tasks = sequences * int64_t(plan.pieces.size());
  torch::stable::parallel_for(0, tasks, grain(cost, kTaskProducts), [&](int64_t begin, int64_t end) {
    const AlignedBuffer buffer(scratch * int64_t(sizeof(float)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / sequences;
      f(task % sequences, p, plan.pieces[p], static_cast<float*>(buffer.data()));
    }
  });
}

inline Tokens tokens_of(const Tensor& x, int64_t sequence) {
  if (x.size(3) == 0) return {x.data_ptr(), 0, 1};  // an empty tensor may have any strides
  return {pair_data(x, sequence), x.stride(1), x.stride(3)};
}

// The state of one batch element and head before the call, in the layout of the kernels.
inline void read_initial(const std::optional<Tensor>& matrix, const std::optional<Tensor>& vector, int64_t sequence,
                  const LinearAttention& args, float* state) {
  const int64_t size = args.size, value_size = args.value_size, row = padded(value_size);
  std::fill_n(state, state_size(size, value_size), 0.0f);
  if (!matrix || size == 0) return;
  const int64_t b = sequence / matrix->size(1), h = sequence % matrix->size(1);
  const float* z = static_cast<const float*>(vector->data_ptr()) + b * vector->stride(0) + h * vector->stride(1);
  for (int64_t d = 0; d < size; ++d) state[size * row + d] = z[d * vector->stride(2)];
  if (value_size == 0) return;
  const float* from = static_cast<const float*>(matrix->data_ptr()) + b * matrix->stride(0) + h * matrix->stride(1);
  for (int64_t d = 0; d < size; ++d) {
    for (int64_t e = 0; e < value_size; ++e) {
      state[d * row + e] = from[d * matrix->stride(2) + e * matrix->stride(3)];
    }
  }
}

inline void write_final(const float* state, int64_t sequence, const LinearAttention& args, const Tensor& matrix,
                 const Tensor& vector) {
  const int64_t size = args.size, value_size = args.value_size;
  float* out = static_cast<float*>(matrix.data_ptr()) + sequence * size * value_size;
  float* z = static_cast<float*>(vector.data_ptr()) + sequence * size;
  for (int64_t d = 0; d < size; ++d) std::copy_n(state + d * padded(value_size), value_size, out + d * value_size);
  std::copy_n(state + size * padded(value_size), size, z);
}

// state += sum; `sum` becomes the state before or after the addition.
inline void accumulate(float* state, float* sum, int64_t count, bool before) {
  for (int64_t i = 0; i < count; ++i) {
    const float after = state[i] + sum[i];
    sum[i] = before ? state[i] : after;
    state[i] = after;
  }
}

inline void check_tokens(const char* op, const char* name, const Tensor& x, const Tensor& q, int64_t channels) {
  check_cpu(x, op, name);
  check_dtype(x, q.scalar_type(), op, name);
  check_shape(x, {q.size(0), q.size(1), q.size(2), channels}, op, name);
}

inline void check_state(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check_cpu(x, op, name);
  check_dtype(x, ScalarType::Float, op, name);
  check_shape(x, shape, op, name);
}

// Checks the arguments that forward and backward share.
inline LinearAttention check_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const std::optional<Tensor>& S, const std::optional<Tensor>& z,
                                       const std::string& feature_map, bool causal, int64_t block_size,
                                       bool normalize, double scale) {
  check_dim(q, 4, op, "q");
  check_dim(v, 4, op, "v");
  check_cpu(q, op, "q");
  LinearAttention args{};
  args.dtype = float_dtype_of(q.scalar_type(), op, "q");
  VIDMEM_CHECK(args.dtype != DType::float64, op, "q must be float32, bfloat16 or float16, got float64");
  args.size = q.size(3);
  args.value_size = v.size(3);
  check_tokens(op, "k", k, q, args.size);
  check_tokens(op, "v", v, q, args.value_size);
  check_extent(q, op, "q");
  check_extent(v, op, "v");
  VIDMEM_CHECK(!causal || block_size >= 1, op, "block_size must be at least 1, got ", block_size);
  VIDMEM_CHECK(S.has_value() == z.has_value(), op, "S and z must be given together, got ", S ? "S" : "z", " alone");
  if (S) {
    check_state(op, "S", *S, {q.size(0), q.size(2), args.size, args.value_size});
    check_state(op, "z", *z, {q.size(0), q.size(2), args.size});
  }
  args.map = feature_map_of(op, feature_map);
  args.normalize = normalize;
  args.scale = static_cast<float>(scale);
  const int64_t tokens = std::max<int64_t>(1, q.size(1));
  args.block = causal ? std::min(block_size, tokens) : tokens;
  return args;
}

}  // namespace vidmem
